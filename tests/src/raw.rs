//! Requests as raw bytes, for what no client library would send.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What came back.
#[derive(Debug)]
pub struct Heard {
    /// All bytes, as text.
    pub text: String,
    /// The other side has closed the connection.
    pub closed: bool,
}

impl Heard {
    /// Status codes of all answers.
    pub fn statuses(&self) -> Vec<u16> {
        let heads = self.text.split("HTTP/1.1 ").skip(1);
        heads.filter_map(|rest| rest.get(..3)?.parse().ok()).collect()
    }
}

/// Sends bytes and listens until the other side closes, or is silent for `patience`.
pub async fn say(address: SocketAddr, bytes: &[u8], patience: Duration) -> Heard {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // It may refuse before all is sent.
    let _refused = socket.write_all(bytes).await;
    listen(&mut socket, patience).await
}

/// Listens until the other side closes, or is silent for `patience`.
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

/// A chat request with these further header lines and this body.
pub fn post(headers: &str, body: &str) -> String {
    format!("POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n{body}")
}

/// A small chat body for model `m`.
pub const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
