//! Rules of the code base: dependencies between crates, places that write files, and the size of files.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use system_tests::programs::root;

/// Crate -> (folder, crates of this workspace that it may depend on).
fn rules() -> BTreeMap<&'static str, (&'static str, &'static [&'static str])> {
    BTreeMap::from([
        ("shared", ("shared", &[] as &[_])),
        ("gateway", ("gateway", &["shared"])),
        ("data", ("trainer/data", &["shared"])),
        ("sandbox", ("trainer/sandbox", &[])),
        ("verify", ("trainer/verify", &["sandbox"])),
        ("engine", ("trainer/engine", &["shared"])),
        ("cot", ("trainer/cot", &["data", "verify", "shared"])),
        ("learn", ("trainer/learn", &["data", "verify", "engine", "shared"])),
        (
            "trainer",
            ("trainer", &["gateway", "data", "sandbox", "verify", "cot", "engine", "learn", "shared"]),
        ),
    ])
}

fn dependencies(folder: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let table = manifest.get("dependencies").and_then(toml::Value::as_table).cloned().unwrap_or_default();
    table.keys().cloned().collect()
}

/// All Rust files below `folder`, with their text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(sources(&path));
            }
        } else if name.ends_with(".rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

#[test]
fn crates_depend_only_on_permitted_crates() {
    for (name, (folder, allowed)) in rules() {
        for dependency in dependencies(folder) {
            if let Some(used) = dependency.strip_prefix("potstill-") {
                assert!(allowed.contains(&used), "`{name}` must not use `{used}`");
            }
        }
    }
}

#[test]
fn heavy_dependencies_stay_in_their_crates() {
    for (name, (folder, _)) in rules() {
        let found = dependencies(folder);
        let may = |library: &str, crates: &[&str]| {
            let uses = found.iter().any(|dependency| dependency.starts_with(library));
            assert!(!uses || crates.contains(&name), "`{name}` must not use `{library}`");
        };
        may("candle", &["engine", "learn", "trainer"]);
        may("axum", &["gateway", "trainer"]);
        may("reqwest", &["shared"]);
        may("hyper", &["gateway"]);
        may("hf-hub", &["data"]);
        may("parquet", &["data"]);
        may("tokio-postgres", &["data"]);
        may("llguidance", &["engine"]);
    }
    for (path, text) in sources(&root().join("trainer/src")) {
        let local = path.strip_prefix(root().join("trainer/src")).unwrap();
        let place = local.to_str().unwrap();
        assert!(
            !text.contains("potstill_gateway") || place == "local.rs",
            "`{place}` names the gateway crate"
        );
        let serves = place.starts_with("serve");
        assert!(serves || !text.contains("use axum"), "`{place}` uses axum outside `serve`");
    }
}

#[test]
fn only_durable_writes_files() {
    let writers = ["File::create(", "fs::write(", "OpenOptions::new()", "fs::rename("];
    for (path, text) in sources(&root()) {
        let place = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let product = text.split("#[cfg(test)]").next().unwrap();
        // Node processes append to their own log files.
        let allowed = place == "shared/src/durable.rs"
            || place == "gateway/src/autoscale/actuators/process.rs"
            // The maps of a user namespace are set by writing to `/proc`.
            || place == "trainer/sandbox/src/child.rs"
            || place.starts_with("tests/")
            || place.contains("/tests/");
        for writer in writers {
            assert!(allowed || !product.contains(writer), "`{place}` writes files itself (`{writer}`)");
        }
    }
}

#[test]
fn files_are_short_and_have_a_head_comment() {
    for (path, text) in sources(&root()) {
        let place = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        assert!(text.starts_with("//!"), "`{place}` does not say what it is");
        let lines = text.lines().count();
        assert!(lines <= 600, "`{place}` has {lines} lines");
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            !["mod", "utils", "util", "common", "helpers", "manager"].contains(&name),
            "`{place}`: say what it holds"
        );
    }
}

#[test]
fn unsafe_code_is_in_kernels_only() {
    for (path, text) in sources(&root()) {
        let place = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        if place.starts_with("trainer/engine/src/ops/") {
            let uses = text.matches("unsafe {").count() + text.matches("unsafe impl").count();
            assert_eq!(uses, text.matches("// SAFETY:").count(), "`{place}`");
        } else if place != "tests/tests/tidy.rs" {
            assert!(!text.contains("unsafe {"), "`{place}` holds unsafe code");
        }
    }
}
