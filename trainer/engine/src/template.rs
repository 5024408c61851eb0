//! Chat templates: Jinja as Hugging Face writes it, run by minijinja with fuel and an output cap, since a template comes
//! with a model file and is not trusted. No loader, no file access.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

use crate::error::EngineError;

/// Longest template source.
const MAX_SOURCE: usize = 64 << 10;
/// Longest rendered prompt.
const MAX_OUTPUT: usize = 8 << 20;
/// Instructions that one rendering may take.
const FUEL: u64 = 20_000_000;

/// A compiled chat template with the texts of its special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

fn failed(error: &minijinja::Error) -> EngineError {
    let mut text = error.to_string();
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        text = format!("{text}: {inner}");
        cause = inner;
    }
    EngineError::Template(text)
}

impl ChatTemplate {
    /// Compiles `source`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, EngineError> {
        if source.len() > MAX_SOURCE {
            return Err(EngineError::Template(format!("longer than {MAX_SOURCE} bytes")));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| failed(&error))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |_format: String| String::new());
        environment.add_template_owned("chat", source.to_owned()).map_err(|error| failed(&error))?;
        Ok(Self { environment, source: source.to_owned(), bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// ChatML, for models that ship no template.
    pub fn chatml() -> Result<Self, EngineError> {
        let source = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        Self::new(source, "", "<|im_end|>")
    }

    /// The source, for export.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Text of the token that ends a turn.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    /// Text of the token that begins a text.
    pub fn bos(&self) -> &str {
        &self.bos
    }

    /// Renders a conversation. `messages` is a list of objects with `role` and `content`; `extra` holds what the request
    /// passes on (`chat_template_kwargs`, `tools`).
    pub fn render(
        &self,
        messages: &Value,
        add_generation_prompt: bool,
        extra: &Value,
    ) -> Result<String, EngineError> {
        let template = self.environment.get_template("chat").map_err(|error| failed(&error))?;
        let own = context! {
            messages => minijinja::Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let all = context! { ..own, ..minijinja::Value::from(Serde(extra)) };
        let text = template.render(all).map_err(|error| failed(&error))?;
        if text.len() > MAX_OUTPUT {
            return Err(EngineError::Template(format!("rendered more than {MAX_OUTPUT} bytes")));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
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
    fn python_methods_and_refusals_work() {
        let source = "{% if messages[0].content.startswith('x') %}{{ raise_exception('no x') }}{% endif %}{{ messages[0]['content'].strip() }}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        let render =
            |content: &str| template.render(&json!([{"role": "user", "content": content}]), true, &json!({}));
        assert_eq!(render(" a ").unwrap(), "a");
        assert!(render("x").unwrap_err().to_string().contains("no x"));
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let template = ChatTemplate::new(
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}",
            "",
            "",
        )
        .unwrap();
        assert!(template.render(&json!([]), true, &json!({})).is_err());
    }
}
