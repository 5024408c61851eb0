//! What no log may hold, looked for in all that is logged while the tests run: gateways in this process at the most talkative
//! level, programs in what they printed by their end.

use std::io::{self, Write};
use std::sync::Once;

use tracing_subscriber::filter::LevelFilter;

/// What the tests ask.
pub const PROMPT: &str = "canary-prompt-5c1e";

/// The prompt, and how every key begins.
const SECRETS: [&str; 2] = [PROMPT, "sk-potstill-"];

/// Which secret `text` holds.
pub fn secret_in(text: &[u8]) -> Option<&'static str> {
    let holds = |secret: &&str| text.windows(secret.len()).any(|part| part == secret.as_bytes());
    SECRETS.into_iter().find(holds)
}

/// From now on this process ends as soon as a secret is logged.
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

/// Reads what is logged, line by line.
struct Reader;

impl Write for Reader {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(secret) = secret_in(line) {
            // A panic would end one task of the gateway, and no test.
            let _told = writeln!(io::stderr(), "`{secret}` was logged: {}", line.escape_ascii());
            std::process::abort();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
