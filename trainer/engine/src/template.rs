//! Chat templates: Hugging Face's Jinja dialect, run by minijinja. A template comes with a model file and
//! is not trusted, so instructions and output are bounded. Templates have no access to files or other
//! templates.

use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

use crate::error::EngineError;

/// Maximum size of a template's source in bytes.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Maximum size of a rendered prompt in bytes.
const MAX_OUTPUT_BYTES: usize = 8 << 20;
/// Maximum number of instructions (minijinja's fuel) per rendering.
const MAX_INSTRUCTIONS: u64 = 20_000_000;

/// A compiled chat template with the texts of the special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

/// Returns an error with all causes in its text.
fn template_error(error: &minijinja::Error) -> EngineError {
    let mut text = error.to_string();
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        text = format!("{text}: {inner}");
        cause = inner;
    }
    EngineError::Template(text)
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts of the tokens that begin a text and end a turn.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, EngineError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(EngineError::Template(format!("longer than {MAX_SOURCE_BYTES} bytes")));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error(&error))?);
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |_format: String| String::new());
        environment.add_template_owned("chat", source.to_owned()).map_err(|error| template_error(&error))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos_token: bos.to_owned(),
            eos_token: eos.to_owned(),
        })
    }

    /// Returns the ChatML template, for models without a template.
    pub fn chatml() -> Result<Self, EngineError> {
        let source = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        Self::new(source, "", "<|im_end|>")
    }

    /// Returns the source, for export.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Returns the text of the token that ends a turn.
    pub fn eos_token(&self) -> &str {
        &self.eos_token
    }

    /// Returns the text of the token that begins a text.
    pub fn bos_token(&self) -> &str {
        &self.bos_token
    }

    /// Renders a conversation to a prompt. `messages` is a list of objects with `role` and `content`.
    /// `extra` holds further variables of the request (`chat_template_kwargs`, `tools`).
    pub fn render(
        &self,
        messages: &Value,
        add_generation_prompt: bool,
        extra: &Value,
    ) -> Result<String, EngineError> {
        let template = self.environment.get_template("chat").map_err(|error| template_error(&error))?;
        let own = context! {
            messages => minijinja::Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let all = context! { ..own, ..minijinja::Value::from(Serde(extra)) };
        let mut text = BoundedWriter(Vec::new());
        template.render_captured_to(all, &mut text).map_err(|error| template_error(&error))?;
        String::from_utf8(text.0).map_err(|error| EngineError::Template(error.to_string()))
    }
}

/// A writer that fails beyond [`MAX_OUTPUT`] bytes.
struct BoundedWriter(Vec<u8>);

impl Write for BoundedWriter {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + text.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("it renders more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn chatml_renders_turns() {
        let text = ChatTemplate::chatml()
            .unwrap()
            .render(&json!([{"role": "user", "content": "hi"}]), true, &json!({}))
            .unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn supports_python_string_methods_and_raise_exception() {
        let source = "{% if messages[0].content.startswith('x') %}{{ raise_exception('no x') }}{% endif %}{{ messages[0]['content'].strip() }}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        let render =
            |content: &str| template.render(&json!([{"role": "user", "content": content}]), true, &json!({}));
        assert_eq!(render(" a ").unwrap(), "a");
        assert!(render("x").unwrap_err().to_string().contains("no x"));
    }

    #[test]
    fn stops_endless_and_oversized_templates() {
        let grown = "{% set x = namespace(t='x') %}{% for i in range(60) %}{% set x.t = x.t ~ x.t %}{% endfor %}{{ x.t }}";
        for (source, word) in [
            ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "fuel"),
            ("{% for i in range(999) %}{{ 'x' * 20000 }}{% endfor %}", "renders more"),
            ("{{ 'x' * 9999999999999 }}", "fuel"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% include 'other' %}", "other"),
            (grown, ""),
        ] {
            let template = ChatTemplate::new(source, "", "").unwrap();
            let error = template.render(&json!([]), true, &json!({})).unwrap_err().to_string();
            assert!(error.contains(word), "{source}: {error}");
        }
        let nested = "{% if true %}".repeat(4000);
        assert!(ChatTemplate::new(&nested, "", "").is_err());
        let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
        assert!(ChatTemplate::new(&brackets, "", "").is_err());
    }

    proptest! {
        /// Random sequences of template fragments render or fail, but never panic.
        #[test]
        fn arbitrary_templates_never_panic(pieces in prop::collection::vec(0..PIECES.len(), 0..12), noise in ".{0,12}") {
            let source: String = pieces.iter().map(|at| PIECES[*at]).chain([noise.as_str()]).collect();
            if let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") {
                let _either = template.render(&json!([{"role": "user", "content": "x"}]), true, &json!({"tools": [{"a": [1]}]}));
            }
        }
    }

    const PIECES: [&str; 16] = [
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if messages[0].role == 'user' %}",
        "{% elif tools is defined %}",
        "{% endif %}",
        "{% set ns = namespace(a=messages) %}",
        "{{ messages[-1]['content'].split('x')[9] }}",
        "{{ tools | tojson(indent=4) }}",
        "{{ (messages | length) // 0 }}",
        "{{ messages[::-1][:1] | map(attribute='role') | list }}",
        "{{ 'a'.replace('', 'b') * 3 }}",
        "{%- macro f(x) -%}{{ x }}{%- endmacro -%}{{ f(messages) }}",
        "{{ strftime_now(1) }}",
        "{{ eos_token ~ bos_token[5:] }}",
        "{{ 9223372036854775807 + 1 }}",
        "{% break %}",
    ];
}
