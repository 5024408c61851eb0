//! The manifests in `k8s/` against the programs. Every overlay renders and validates strictly. Every port, path, flag,
//! variable and metric in it exists in the programs.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use potstill_gateway::config::{Actuator, Config};
use serde_json::Value;
use system_tests::kubernetes::rights::{Attempt, Rights};
use system_tests::programs::{program, root, serve_teacher};
use system_tests::started::Started;

/// Oldest and newest Kubernetes version to validate for.
const VERSIONS: &str = "1.33,1.37";

/// Returns the available renderer: `kubectl kustomize` or `kustomize build`. Its absence is an error in CI only.
fn renderer() -> Option<[&'static str; 2]> {
    let found = |program: &str| Command::new(program).arg("version").output().is_ok();
    let known = [["kubectl", "kustomize"], ["kustomize", "build"]];
    let renderer = known.into_iter().find(|[program, _]| found(program));
    assert!(
        renderer.is_some() || std::env::var("POTSTILL_CLIENTS").is_err(),
        "neither kubectl nor kustomize is installed"
    );
    renderer
}

/// Rendered overlays by name: the text and its objects.
fn rendered() -> &'static BTreeMap<String, (String, Vec<Value>)> {
    static RENDERED: OnceLock<BTreeMap<String, (String, Vec<Value>)>> = OnceLock::new();
    RENDERED.get_or_init(|| {
        let Some([program, verb]) = renderer() else { return BTreeMap::new() };
        let mut folders = vec![root().join("k8s/base")];
        folders.extend(
            std::fs::read_dir(root().join("k8s/overlays")).unwrap().map(|entry| entry.unwrap().path()),
        );
        let render = |folder: &Path| {
            let output = Command::new(program).arg(verb).arg(folder).output().unwrap();
            assert!(
                output.status.success(),
                "{}: {}",
                folder.display(),
                String::from_utf8_lossy(&output.stderr)
            );
            let text = String::from_utf8(output.stdout).unwrap();
            let objects = serde_saphyr::from_multiple(&text).unwrap();
            (folder.file_name().unwrap().to_str().unwrap().to_owned(), (text, objects))
        };
        folders.iter().map(|folder| render(folder)).collect()
    })
}

/// All pod templates in an object, including those of custom resources.
fn templates(value: &Value) -> Vec<&Value> {
    if value["spec"]["containers"].is_array() {
        return vec![value];
    }
    match value {
        Value::Object(fields) => fields.values().flat_map(templates).collect(),
        Value::Array(items) => items.iter().flat_map(templates).collect(),
        _ => Vec::new(),
    }
}

/// Pod templates of an overlay, each with the name of its object.
fn pods(objects: &[Value]) -> Vec<(String, &Value)> {
    let all = objects.iter().flat_map(|object| {
        let name =
            format!("{} {}", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
        templates(object).into_iter().map(move |template| (name.clone(), template))
    });
    all.collect()
}

fn list<'a>(value: &'a Value) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn containers(template: &Value) -> impl Iterator<Item = &Value> {
    list(&template["spec"]["initContainers"]).chain(list(&template["spec"]["containers"]))
}

/// Configuration of the gateway in an overlay.
fn config(objects: &[Value]) -> (Config, String) {
    let map = objects.iter().find(|object| !object["data"]["gateway.toml"].is_null()).unwrap();
    let text = text(&map["data"]["gateway.toml"]).to_owned();
    (toml::from_str(&text).unwrap(), text)
}

fn matches(selector: &Value, labels: &Value) -> bool {
    selector.as_object().is_some_and(|wanted| wanted.iter().all(|(name, value)| labels[name] == *value))
}

#[test]
fn overlays_render_and_validate_strictly() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<_> = rendered()
        .iter()
        .map(|(name, (text, _))| {
            let path = folder.path().join(format!("{name}.yaml"));
            std::fs::write(&path, text).unwrap();
            path
        })
        .collect();
    let Ok(clients) = std::env::var("POTSTILL_CLIENTS") else { return };
    assert!(files.len() >= 9, "{files:?}");
    let clients = Path::new(&clients);
    let run = |file: &[std::path::PathBuf]| {
        let output = Command::new(clients.join("python/bin/python"))
            .arg(root().join("tests/clients/validate_manifests.py"))
            .arg(VERSIONS)
            .args(file)
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let (valid, said) = run(&files);
    assert!(valid, "{said}");
    // The validation must be able to fail: it finds a misspelled field in a pod of a custom resource.
    let wrong = folder.path().join("wrong.yaml");
    let text = &rendered()["r1-h20"].0;
    std::fs::write(&wrong, text.replace("readinessProbe", "readynessProbe")).unwrap();
    let (valid, said) = run(&[wrong]);
    assert!(!valid && said.contains("LeaderWorkerSet") && said.contains("readynessProbe"), "{said}");
}

#[tokio::test]
async fn ports_and_paths_match_the_programs() {
    let gateway =
        Started::with("[[pools]]\nmodel = \"m\"\nnodes = [{ url = \"http://127.0.0.1:9\" }]\n", "warn").await;
    let (_node, node) = serve_teacher(&[]).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut probed = BTreeSet::new();
    for (overlay, (_, objects)) in rendered() {
        let (config, _) = config(objects);
        let mut listens =
            BTreeSet::from([config.listen.port(), config.admin.as_ref().unwrap().listen.port()]);
        listens.extend(config.autoscale.keda_listen.map(|address| address.port()));
        let all = pods(objects);
        for (name, template) in &all {
            for container in containers(template) {
                let ports: BTreeMap<&str, u64> = list(&container["ports"])
                    .map(|port| (text(&port["name"]), port["containerPort"].as_u64().unwrap()))
                    .collect();
                let is_gateway = container["name"] == "gateway";
                if is_gateway {
                    let declared: BTreeSet<u16> = ports.values().map(|port| *port as u16).collect();
                    assert_eq!(declared, listens, "{overlay}: {name}");
                }
                // Workers of a group get the leader's arguments and serve nothing.
                let told = list(&container["args"]).filter_map(|a| text(a).strip_prefix("--port="));
                for argument in told.filter(|_| !ports.is_empty()) {
                    assert_eq!(ports["http"].to_string(), argument, "{overlay}: {name}");
                }
                for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
                    let get = &container[probe]["httpGet"];
                    if !get.is_null() {
                        assert!(ports.contains_key(text(&get["port"])), "{overlay}: {name}: {get}");
                        probed.insert((is_gateway, text(&get["path"]).to_owned()));
                    }
                }
            }
        }
        // Services and monitors name ports that the selected pods have.
        for service in objects.iter().filter(|object| object["kind"] == "Service") {
            let behind: Vec<_> = all
                .iter()
                .filter(|(_, template)| {
                    matches(&service["spec"]["selector"], &template["metadata"]["labels"])
                })
                .collect();
            assert!(!behind.is_empty(), "{overlay}: no pod is behind {}", service["metadata"]["name"]);
            for port in list(&service["spec"]["ports"]) {
                let named = |template: &Value| {
                    containers(template).any(|c| list(&c["ports"]).any(|p| p["name"] == port["targetPort"]))
                };
                assert!(behind.iter().all(|(_, template)| named(template)), "{overlay}: {port}");
            }
        }
        for monitor in objects.iter().filter(|object| text(&object["kind"]).ends_with("Monitor")) {
            let endpoints =
                list(&monitor["spec"]["endpoints"]).chain(list(&monitor["spec"]["podMetricsEndpoints"]));
            for endpoint in endpoints {
                assert_eq!((text(&endpoint["path"]), text(&endpoint["port"])), ("/metrics", "http"));
            }
        }
        // The workload that a pool names exists, with that port.
        for pool in
            config.pools.iter().filter_map(|pool| Some((pool.model.clone(), pool.scale.clone()?.kubernetes?)))
        {
            let (model, kubernetes) = pool;
            let workload = objects.iter().find(|object| {
                object["kind"] == kubernetes.kind.name()
                    && object["metadata"]["name"] == kubernetes.name.as_str()
            });
            let workload = workload.unwrap_or_else(|| panic!("{overlay}: `{model}` names no workload"));
            let leader = templates(workload)[0];
            let ports: Vec<u64> = containers(leader)
                .flat_map(|container| {
                    list(&container["ports"]).filter_map(|port| port["containerPort"].as_u64())
                })
                .collect();
            assert_eq!(ports, [u64::from(kubernetes.port)], "{overlay}: {model}");
            let served: Vec<String> =
                containers(leader).flat_map(|c| list(&c["args"]).map(|a| text(a).to_owned())).collect();
            let names = [format!("--served-model-name={model}"), format!("--name={model}")];
            assert!(
                served.iter().any(|argument| names.contains(argument)),
                "{overlay}: its pods do not serve `{model}`"
            );
        }
    }
    for (is_gateway, path) in probed {
        let url = if is_gateway { &gateway.url } else { &node };
        let status = client.get(format!("{url}{path}")).send().await.unwrap().status();
        assert!(status.as_u16() != 404, "`{path}` is not known");
    }
    for url in [&gateway.url, &node] {
        assert!(client.get(format!("{url}/metrics")).send().await.unwrap().status().is_success());
    }
}

#[test]
fn flags_and_variables_match_the_programs() {
    let mut checked = 0;
    let bytes: BTreeMap<&str, Vec<u8>> = ["potstill", "potstill-gateway"]
        .into_iter()
        .map(|name| (name, std::fs::read(program(name)).unwrap()))
        .collect();
    let holds =
        |name: &str, word: &str| bytes[name].windows(word.len()).any(|window| window == word.as_bytes());
    for (overlay, (rendered, objects)) in rendered() {
        let (config, configured) = config(objects);
        for (name, template) in pods(objects) {
            for container in
                containers(template).filter(|container| text(&container["image"]).starts_with("potstill"))
            {
                let words: Vec<&str> =
                    list(&container["command"]).chain(list(&container["args"])).map(text).collect();
                let (binary, arguments) = words.split_first().unwrap();
                if *binary == "sh" {
                    continue;
                }
                let help = Command::new(program(binary)).args([arguments[0], "--help"]).output().unwrap();
                let help = String::from_utf8(help.stdout).unwrap();
                for flag in arguments.iter().filter(|argument| argument.starts_with("--")) {
                    let flag = flag.split('=').next().unwrap();
                    assert!(
                        help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")),
                        "{overlay}: {name}: `{flag}`"
                    );
                    checked += 1;
                }
                for variable in list(&container["env"]).map(|variable| text(&variable["name"])) {
                    let known = holds(binary, variable)
                        || configured.contains(variable)
                        || rendered.contains(&format!("{variable}\""));
                    assert!(known, "{overlay}: {name}: nobody reads `{variable}`");
                    checked += 1;
                }
            }
        }
        // Conversely, every variable that the configuration reads is set.
        let gateway =
            pods(objects).into_iter().find(|(name, _)| name == "Deployment potstill-gateway").unwrap().1;
        let set: Vec<&str> =
            list(&gateway["spec"]["containers"][0]["env"]).map(|variable| text(&variable["name"])).collect();
        let mut read: Vec<String> = config.keys.iter().filter_map(|key| key.env.clone()).collect();
        read.extend(config.admin.as_ref().and_then(|admin| admin.env.clone()));
        assert!(read.iter().all(|name| set.contains(&name.as_str())), "{overlay}: {read:?} {set:?}");
        // Processes that the gateway starts itself.
        for process in config.pools.iter().filter_map(|pool| pool.scale.as_ref()?.process.as_ref()) {
            let help = Command::new(program(&process.command[0]))
                .args([&process.command[1], "--help"])
                .output()
                .unwrap();
            let help = String::from_utf8(help.stdout).unwrap();
            for flag in process.command.iter().filter(|word| word.starts_with("--")) {
                assert!(help.contains(flag.as_str()), "{overlay}: `{flag}`");
            }
        }
    }
    assert!(checked > 20 || rendered().is_empty(), "{checked}");
}

#[test]
fn configurations_and_recipes_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    for (overlay, (_, objects)) in rendered() {
        let path = folder.path().join(format!("{overlay}.toml"));
        std::fs::write(&path, config(objects).1).unwrap();
        let output = Command::new(program("potstill-gateway"))
            .args(["check".as_ref(), path.as_os_str()])
            .envs([("POTSTILL_API_KEY", "a"), ("POTSTILL_ADMIN_KEY", "b")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{overlay}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // The recipe, with its paths replaced by existing ones.
    for name in ["problems.jsonl", "test.jsonl"] {
        std::fs::write(folder.path().join(name), "{\"problem\": \"1+1?\", \"answer\": \"2\"}\n").unwrap();
    }
    let recipe = std::fs::read_to_string(root().join("k8s/overlays/training/recipe.toml")).unwrap();
    let place = folder.path().to_str().unwrap();
    let teacher = system_tests::programs::teacher();
    let recipe = recipe.replace("/data", place).replace("/models/base", teacher.to_str().unwrap());
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, recipe).unwrap();
    let output = Command::new(program("potstill"))
        .args(["check".as_ref(), path.as_os_str()])
        .envs([("POTSTILL_API_KEY", "a"), ("POTSTILL_ADMIN_KEY", "b")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn metrics_of_dashboards_and_alerts_exist() {
    if rendered().is_empty() {
        return;
    }
    let gateway = std::fs::read(program("potstill-gateway")).unwrap();
    let exists = |word: &str| gateway.windows(word.len()).any(|window| window == word.as_bytes());
    let rules = &rendered()["monitoring"].0;
    let mut names = BTreeSet::new();
    for word in rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
        if word.starts_with("potstill_gateway_") || word.starts_with("gen_ai_server_") {
            let base =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            names.insert(base.to_owned());
        }
    }
    assert!(names.len() >= 15, "{names:?}");
    for name in &names {
        let short = name.strip_prefix("potstill_gateway_").unwrap_or(name);
        assert!(exists(name) || exists(short), "`{name}` is no metric of the gateway");
    }
    assert!(!exists("desired_pods"), "the check can fail");
}

#[test]
fn every_object_follows_the_conventions() {
    for (overlay, (rendered, objects)) in rendered() {
        let (config, _) = config(objects);
        let all = pods(objects);
        assert!(!rendered.contains("kind: ClusterRole") && !rendered.contains(":latest"), "{overlay}");
        for (name, template) in &all {
            let spec = &template["spec"];
            let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
            assert_eq!(
                spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
                "{overlay}: {name}"
            );
            for container in containers(template) {
                let image = text(&container["image"]);
                assert!(image.rsplit('/').next().unwrap().contains(':'), "{overlay}: {name}: {image}");
                assert_eq!(
                    container["securityContext"]["allowPrivilegeEscalation"], false,
                    "{overlay}: {name}"
                );
                assert!(!container["resources"]["limits"]["memory"].is_null(), "{overlay}: {name}");
                let wait = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or(0);
                let drain = if container["name"] == "gateway" { config.drain_seconds } else { 0 };
                assert!(grace >= wait + drain, "{overlay}: {name}: {grace} s are less than {wait} + {drain}");
                for argument in
                    list(&container["args"]).filter_map(|a| text(a).strip_prefix("--shutdown-timeout="))
                {
                    assert!(argument.parse::<u64>().unwrap() + wait <= grace, "{overlay}: {name}");
                }
            }
            // A network policy permits traffic to each port of a pod, and to no other.
            let labels = &template["metadata"]["labels"];
            for container in containers(template) {
                for port in list(&container["ports"]).map(|port| &port["containerPort"]) {
                    let open =
                        objects.iter().filter(|object| object["kind"] == "NetworkPolicy").any(|policy| {
                            let chosen = &policy["spec"]["podSelector"]["matchLabels"];
                            !chosen.is_null()
                                && matches(chosen, labels)
                                && list(&policy["spec"]["ingress"])
                                    .any(|rule| list(&rule["ports"]).any(|p| p["port"] == *port))
                        });
                    assert!(open, "{overlay}: {name}: nobody may reach {port}");
                }
            }
        }
        assert!(
            objects
                .iter()
                .any(|o| o["kind"] == "NetworkPolicy" && o["spec"]["podSelector"] == serde_json::json!({}))
        );
        for budget in objects.iter().filter(|object| object["kind"] == "PodDisruptionBudget") {
            let selector = &budget["spec"]["selector"]["matchLabels"];
            assert!(
                all.iter().any(|(_, template)| matches(selector, &template["metadata"]["labels"])),
                "{overlay}: {budget}"
            );
        }
        // The roles permit what each pool needs, and forbid changing what KEDA changes.
        let rights = Rights::of(std::slice::from_ref(rendered));
        for pool in &config.pools {
            let Some(scale) = &pool.scale else { continue };
            let Some(kubernetes) = &scale.kubernetes else { continue };
            let (group, plural) = match kubernetes.kind.name() {
                "Deployment" => ("apps", "deployments"),
                "StatefulSet" => ("apps", "statefulsets"),
                _ => ("leaderworkerset.x-k8s.io", "leaderworkersets"),
            };
            let attempt = |verb| Attempt {
                verb,
                group: group.to_owned(),
                resource: format!("{plural}/scale"),
                name: Some(kubernetes.name.clone()),
            };
            assert!(rights.grant(&attempt("get")), "{overlay}");
            assert_eq!(
                rights.grant(&attempt("patch")),
                kubernetes.actuator == Actuator::Gateway,
                "{overlay}"
            );
            // The drain timeout must not exceed the termination grace period.
            let workload = objects.iter().find(|object| {
                object["metadata"]["name"] == kubernetes.name.as_str()
                    && object["kind"] == kubernetes.kind.name()
            });
            let grace =
                templates(workload.unwrap())[0]["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
            assert!(grace >= scale.drain_timeout_s, "{overlay}: {grace}");
        }
        for object in objects.iter().filter(|object| object["kind"] == "ScaledObject") {
            let trigger = &object["spec"]["triggers"][0]["metadata"];
            assert!(config.pools.iter().any(|pool| pool.model == text(&trigger["model"])), "{overlay}");
            let port = config.autoscale.keda_listen.unwrap().port().to_string();
            assert!(text(&trigger["scalerAddress"]).ends_with(&format!(":{port}")), "{overlay}");
        }
        for secret in ["secrets", "pods/exec", "pods/eviction"] {
            let attempt = Attempt {
                verb: "get",
                group: String::new(),
                resource: secret.to_owned(),
                name: Some("a".to_owned()),
            };
            assert!(!rights.grant(&attempt), "{overlay}: {secret}");
        }
    }
}
