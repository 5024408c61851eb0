//! Real client libraries against the real programs: openai-python and openai-node, through the gateway, to `potstill
//! serve`. `tests/clients/setup.sh FOLDER` installs the libraries, and `POTSTILL_CLIENTS` names that folder. Without
//! the variable the tests print that they are skipped; CI sets it.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use system_tests::programs::{serve, serve_teacher, write_caller};
use system_tests::started::Started;

fn clients() -> Option<PathBuf> {
    let folder = std::env::var_os("POTSTILL_CLIENTS").map(PathBuf::from);
    if folder.is_none() {
        println!(
            "left out: POTSTILL_CLIENTS is not set; run tests/clients/setup.sh FOLDER and set it to FOLDER"
        );
    }
    folder
}

async fn through_the_gateway(program: &Path, script: &Path) {
    let (_teacher, node) = serve_teacher(&["--max-running", "4"]).await;
    let folder = tempfile::tempdir().unwrap();
    write_caller(folder.path());
    let (_caller, calling) = serve(folder.path(), "caller", &[]).await;
    let (key, hash) = potstill_gateway::auth::keys::generate_key();
    let config = format!(
        "[[keys]]\nname = \"client\"\nhash = \"{hash}\"\nrequests_per_minute = 6000\n[[pools]]\nmodel = \"demo/teacher\"\nupstream_model = \"teacher\"\nnodes = [{{ url = \"{node}\", slots = 4 }}]\n\
         [[pools]]\nmodel = \"caller\"\nnodes = [{{ url = \"{calling}\" }}]\n"
    );
    let gateway = Started::with(&config, "info").await;
    let output = Command::new(program)
        .arg(script)
        .args([&gateway.url, &key, "demo/teacher"])
        .current_dir(script.parent().unwrap())
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        text(&output.stdout),
        text(&output.stderr),
        gateway.printed()
    );
    assert!(text(&output.stdout).contains(" ok"), "{}", text(&output.stdout));
    println!("{}", text(&output.stdout));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openai_python_works_through_the_gateway() {
    if let Some(folder) = clients() {
        through_the_gateway(&folder.join("python/bin/python"), &folder.join("python_client.py")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openai_node_works_through_the_gateway() {
    if let Some(folder) = clients() {
        through_the_gateway(Path::new("node"), &folder.join("node_client.mjs")).await;
    }
}
