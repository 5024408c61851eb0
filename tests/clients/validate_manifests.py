"""Validates rendered manifests strictly: built-in kinds by Kubernetes' own schemas at each version given, other kinds by
crds.json beside this file, and the pod templates inside those as pods.

    validate_manifests.py 1.33,1.37 RENDERED.yaml...
"""

import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

SCHEMAS = json.loads((pathlib.Path(__file__).parent / "crds.json").read_text())


def pods(value):
    """Pod templates anywhere inside an object of a foreign kind."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
            yield value
            return
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def main():
    versions, files = sys.argv[1].split(","), sys.argv[2:]
    checked, problems = 0, []
    for file in files:
        for document in filter(None, yaml.safe_load_all(pathlib.Path(file).read_text())):
            kind = f"{document['apiVersion']}/{document['kind']}"
            place = f"{pathlib.Path(file).name}: {kind} {document['metadata']['name']}"
            checked += 1
            try:
                if kind in SCHEMAS:
                    jsonschema.validate(document, SCHEMAS[kind])
                    inner = [{"apiVersion": "v1", "kind": "Pod", "metadata": {**pod.get("metadata", {}), "name": "x"}, "spec": pod["spec"]}
                             for pod in pods(document["spec"])]
                else:
                    inner = [document]
                for object_ in inner:
                    for version in versions:
                        kubernetes_validate.validate(object_, version, strict=True)
            except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
                problems.append(f"{place}: {'.'.join(map(str, error.path))}: {error.message[:300]}")
            except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
                problems.append(f"{place}: no schema: {error}")
    print(f"{checked} objects, {len(problems)} problems")
    for problem in problems:
        print(problem)
    sys.exit(bool(problems) or checked == 0)


main()
