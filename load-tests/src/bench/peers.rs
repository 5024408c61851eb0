//! The peers and their configuration: one worker, no access log, plain HTTP/1.1, kept connections to the nodes. The
//! gateway runs with a key, limits, accounting and metrics.

use std::path::Path;

use super::process::{Process, free_port};
use super::programs::{LOAD_CORE, PROXY_CORE, Programs};

/// A proxy, or a direct connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Direct,
    Hyper,
    Nginx,
    Envoy,
    Potstill,
}

/// A running peer.
pub(crate) struct Running {
    pub(crate) peer: Peer,
    pub(crate) port: u16,
    /// `None` for a direct connection.
    pub(crate) process: Option<Process>,
    pub(crate) key: Option<&'static str>,
    _folder: tempfile::TempDir,
}

const KEY: &str = "sk-potstill-bench";

/// A mock node.
pub(crate) struct Node {
    pub(crate) process: Process,
    pub(crate) port: u16,
}

/// Starts a mock node.
pub(crate) async fn node(programs: &Programs, slots: Option<usize>, slower: f64) -> anyhow::Result<Node> {
    let port = free_port()?;
    let mut command =
        vec![programs.own.display().to_string(), "node".into(), "--port".into(), port.to_string()];
    command.extend(["--slower".into(), slower.to_string()]);
    if let Some(slots) = slots {
        command.extend(["--slots".into(), slots.to_string()]);
    }
    Ok(Node { process: Process::start(LOAD_CORE, &command, port).await?, port })
}

impl Peer {
    pub(crate) const ALL: [Self; 5] = [Self::Direct, Self::Hyper, Self::Nginx, Self::Envoy, Self::Potstill];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Hyper => "hyper",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
            Self::Potstill => "potstill",
        }
    }

    /// Returns whether the program of the peer is installed.
    pub(crate) fn installed(&self, programs: &Programs) -> bool {
        let there = |program: &Path| {
            program.is_file()
                || std::env::var_os("PATH").is_some_and(|path| {
                    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
                })
        };
        match self {
            Self::Direct | Self::Hyper => true,
            Self::Nginx => there(&programs.nginx),
            Self::Envoy => there(&programs.envoy),
            Self::Potstill => there(&programs.gateway),
        }
    }

    /// Starts the peer in front of nodes on these ports.
    pub(crate) async fn start(
        self,
        programs: &Programs,
        nodes: &[u16],
        slots: Option<usize>,
    ) -> anyhow::Result<Running> {
        let folder = tempfile::tempdir()?;
        let port = if self == Self::Direct { nodes[0] } else { free_port()? };
        let file = |name: &str, text: String| -> anyhow::Result<String> {
            let path = folder.path().join(name);
            potstill_shared::durable::write_file(&path, text.as_bytes())?;
            Ok(path.display().to_string())
        };
        let program = |path: &Path| path.display().to_string();
        let command = match self {
            Self::Direct => None,
            Self::Hyper => Some(vec![
                program(&programs.own),
                "proxy".into(),
                "--port".into(),
                port.to_string(),
                "--to".into(),
                nodes[0].to_string(),
            ]),
            Self::Nginx => {
                let config = file("nginx.conf", nginx(folder.path(), port, nodes))?;
                Some(vec![program(&programs.nginx), "-c".into(), config])
            }
            Self::Envoy => {
                let config = file("envoy.yaml", envoy(port, nodes))?;
                let rest =
                    ["-c", &config, "--concurrency", "1", "--log-level", "off", "--disable-hot-restart"];
                Some(std::iter::once(program(&programs.envoy)).chain(rest.map(str::to_owned)).collect())
            }
            Self::Potstill => {
                let config = file("gateway.toml", potstill(port, nodes, slots))?;
                Some(vec![program(&programs.gateway), "serve".into(), config])
            }
        };
        let process = match command {
            None => None,
            Some(command) => Some(Process::start(PROXY_CORE, &command, port).await?),
        };
        let key = (self == Self::Potstill).then_some(KEY);
        Ok(Running { peer: self, port, process, key, _folder: folder })
    }
}

fn nginx(folder: &Path, port: u16, nodes: &[u16]) -> String {
    let servers: String = nodes.iter().map(|node| format!("server 127.0.0.1:{node};\n")).collect();
    let folder = folder.display();
    format!(
        "daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log /dev/null crit;
worker_rlimit_nofile 20000;
events {{ worker_connections 16000; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 1000000000;
  client_body_buffer_size 1m; client_max_body_size 64m;
  upstream nodes {{ least_conn; {servers} keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=8192;
    location / {{
      proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection \"\";
      proxy_buffering off; proxy_read_timeout 3600s;
      proxy_next_upstream error timeout http_502 non_idempotent;
    }}
  }}
}}
"
    )
}

fn envoy(port: u16, nodes: &[u16]) -> String {
    let endpoint = |node: &u16| {
        format!(
            "          - endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {node} }} }} }}\n"
        )
    };
    let endpoints: String = nodes.iter().map(endpoint).collect();
    format!(
        "static_resources:
  listeners:
  - address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          generate_request_id: false
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{ prefix: / }}
                route:
                  cluster: nodes
                  timeout: 0s
                  retry_policy: {{ retry_on: \"reset,connect-failure,refused-stream\", num_retries: 2 }}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
  clusters:
  - name: nodes
    connect_timeout: 2s
    type: STATIC
    lb_policy: LEAST_REQUEST
    circuit_breakers: {{ thresholds: [{{ max_connections: 100000, max_pending_requests: 100000, max_requests: 100000 }}] }}
    load_assignment:
      cluster_name: nodes
      endpoints:
      - lb_endpoints:
{endpoints}"
    )
}

fn potstill(port: u16, nodes: &[u16], slots: Option<usize>) -> String {
    let slots = slots.unwrap_or(100_000);
    let node = |node: &u16| format!("{{ url = \"http://127.0.0.1:{node}\", max_concurrency = {slots} }}");
    let nodes: Vec<String> = nodes.iter().map(node).collect();
    let hash = blake3_of(KEY);
    format!(
        "listen = \"127.0.0.1:{port}\"
[[keys]]
name = \"bench\"
hash = \"{hash}\"
requests_per_minute = 4000000000
tokens_per_minute = 1000000000000
concurrency = 1000000
[[pools]]
model = \"m\"
nodes = [{}]
queue = {{ requests = 100000 }}
health = {{ path = \"\", interval_ms = 500 }}
price = {{ prompt = 0.5, completion = 2.0 }}
",
        nodes.join(", ")
    )
}

fn blake3_of(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().to_string()
}
