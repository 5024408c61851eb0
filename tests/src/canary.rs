//! Watches logs for secrets while tests run: logs of gateways in this process at the most verbose level, and the
//! complete output of programs.

use std::io::{self, Write};
use std::sync::Once;

use tracing_subscriber::filter::LevelFilter;

/// Prompt that tests send.
pub const PROMPT: &str = "canary-prompt-5c1e";

/// Text that must not be logged: the prompt, and the prefix of all keys.
const SECRETS: [&str; 2] = [PROMPT, "sk-potstill-"];

/// Returns the secret that `text` contains, if any.
pub fn secret_in(text: &[u8]) -> Option<&'static str> {
    let holds = |secret: &&str| text.windows(secret.len()).any(|part| part == secret.as_bytes());
    SECRETS.into_iter().find(holds)
}

/// Ends this process as soon as a secret is logged.
pub fn watch() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_ansi(false)
            .with_writer(|| Reader)
            .init();
    });
}

/// Receives log lines and searches each.
struct Reader;

impl Write for Reader {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(secret) = secret_in(line) {
            // A panic would end a task of the gateway only, and the test would pass.
            let _told = writeln!(io::stderr(), "`{secret}` was logged: {}", line.escape_ascii());
            std::process::abort();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
