//! A PostgreSQL server in a folder of its own, for one test.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::programs::{Running, free_port};

/// A running server.
pub struct Postgres {
    _server: Running,
    _folder: tempfile::TempDir,
    /// URL of the database, `postgres://…`.
    pub url: String,
}

/// Returns the folder of the server's programs: on the path, or where Debian installs them.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"));
    std::env::split_paths(&path)
        .chain(debian)
        .find(|folder| ["initdb", "postgres", "pg_isready"].iter().all(|name| folder.join(name).exists()))
}

/// PostgreSQL refuses to run as root. As root, the server runs as the user that its package created.
fn as_user(command: &mut Command) {
    let id = |option: &str, user: &str| -> u32 {
        let output =
            Command::new("id").arg(option).args((!user.is_empty()).then_some(user)).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    };
    if id("-u", "") == 0 {
        command.uid(id("-u", "postgres")).gid(id("-g", "postgres"));
    }
}

impl Postgres {
    /// Starts a server. Returns `None` if PostgreSQL is not installed, unless `POTSTILL_CLIENTS` requires everything.
    pub fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            assert!(std::env::var_os("POTSTILL_CLIENTS").is_none(), "no PostgreSQL server is installed");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let mut owner = Command::new("chmod");
        assert!(owner.args(["0777"]).arg(folder.path()).arg(&data).status().unwrap().success());
        let data = data.join("cluster");
        let port = free_port().to_string();
        let mut init = Command::new(programs.join("initdb"));
        init.args(["-A", "trust", "-U", "postgres", "-D"]).arg(&data).current_dir(folder.path());
        as_user(&mut init);
        let made = init.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut server = Command::new(programs.join("postgres"));
        server
            .args(["-p", &port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-D"])
            .arg(&data);
        as_user(server.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null()));
        let server = Running(server.spawn().unwrap());
        let begun = Instant::now();
        let ready = || {
            Command::new(programs.join("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-p", &port])
                .status()
                .unwrap()
                .success()
        };
        while !ready() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the server does not start");
        }
        Some(Self {
            _server: server,
            _folder: folder,
            url: format!("postgres://postgres@127.0.0.1:{port}/postgres"),
        })
    }
}
