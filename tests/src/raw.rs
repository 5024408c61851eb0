//! Requests as raw bytes that no client library would send.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The received data.
#[derive(Debug)]
pub struct Heard {
    /// All bytes, as text.
    pub text: String,
    /// Whether the peer has closed the connection.
    pub closed: bool,
}

impl Heard {
    /// Status codes of all responses.
    pub fn statuses(&self) -> Vec<u16> {
        let heads = self.text.split("HTTP/1.1 ").skip(1);
        heads.filter_map(|rest| rest.get(..3)?.parse().ok()).collect()
    }
}

/// Sends bytes and reads until the peer closes or is silent for `patience`.
pub async fn say(address: SocketAddr, bytes: &[u8], patience: Duration) -> Heard {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // The peer may reject the request before all of it is sent.
    let _refused = socket.write_all(bytes).await;
    listen(&mut socket, patience).await
}

/// Reads until the peer closes or is silent for `patience`.
pub async fn listen(socket: &mut TcpStream, patience: Duration) -> Heard {
    let mut heard = Vec::new();
    let closed = loop {
        let mut buffer = [0u8; 16 << 10];
        match tokio::time::timeout(patience, socket.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => break true,
            Ok(Ok(count)) => heard.extend_from_slice(&buffer[..count]),
            Err(_) => break false,
        }
    };
    Heard { text: String::from_utf8_lossy(&heard).into_owned(), closed }
}

/// Builds a chat request with additional header lines and a body.
pub fn post(headers: &str, body: &str) -> String {
    format!("POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n{body}")
}

/// A small chat body for model `m`.
pub const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
