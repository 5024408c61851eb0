//! Prompt templates: Jinja files, built in or replaced by a folder of the recipe.
//!
//! Each trace holds the hash of its template, so its prompt can be identified later. Deliberately absent: parsing of
//! completions, which each stage does itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::{Environment, context};
use potstill_data::records::Problem;
use potstill_data::tasks::TASKS;
use potstill_shared::id::ContentId;

/// Purpose of a prompt. Each role has one template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptRole {
    /// Assign a problem to a task.
    Classify,
    /// Solve a problem with long reasoning.
    Generate,
    /// Solve a problem with reasoning as long as the problem requires.
    Adaptive,
    /// Grade a trace as easy, medium or hard for the student.
    Difficulty,
    /// Extend a terse trace.
    Extend,
    /// Simplify a convoluted trace.
    Simplify,
    /// Judge whether a final answer equals the reference answer.
    Solution,
    /// Judge whether the reasoning is valid and leads to its answer.
    Process,
    /// Score the reasoning verbosity of a trace, 0 to 9.
    Rv,
    /// Score the cognitive difficulty of a trace, 0 to 9.
    Cd,
}

impl PromptRole {
    /// All roles.
    pub const ALL: [Self; 10] = [
        Self::Classify,
        Self::Generate,
        Self::Adaptive,
        Self::Difficulty,
        Self::Extend,
        Self::Simplify,
        Self::Solution,
        Self::Process,
        Self::Rv,
        Self::Cd,
    ];

    /// Returns the name of the template file without `.jinja`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Generate => "generate",
            Self::Adaptive => "adaptive",
            Self::Difficulty => "difficulty",
            Self::Extend => "extend",
            Self::Simplify => "simplify",
            Self::Solution => "solution",
            Self::Process => "process",
            Self::Rv => "rv",
            Self::Cd => "cd",
        }
    }

    fn default_source(self) -> &'static str {
        match self {
            Self::Classify => include_str!("../prompts/classify.jinja"),
            Self::Generate => include_str!("../prompts/generate.jinja"),
            Self::Adaptive => include_str!("../prompts/adaptive.jinja"),
            Self::Difficulty => include_str!("../prompts/difficulty.jinja"),
            Self::Extend => include_str!("../prompts/extend.jinja"),
            Self::Simplify => include_str!("../prompts/simplify.jinja"),
            Self::Solution => include_str!("../prompts/solution.jinja"),
            Self::Process => include_str!("../prompts/process.jinja"),
            Self::Rv => include_str!("../prompts/rv.jinja"),
            Self::Cd => include_str!("../prompts/cd.jinja"),
        }
    }
}

/// Error while loading the templates.
#[derive(Debug, thiserror::Error)]
#[error("prompt `{path}`: {reason}")]
pub struct PromptError {
    /// Path of the template file, or the role's name for a built-in template.
    pub path: PathBuf,
    /// Cause of the error.
    pub reason: String,
}

/// Templates of all roles. Cheap to clone.
#[derive(Clone)]
pub struct PromptTemplates {
    environment: Arc<Environment<'static>>,
    hashes: Arc<Vec<ContentId>>,
}

impl PromptTemplates {
    /// Loads the built-in templates, or `ROLE.jinja` of `folder` where the file exists.
    ///
    /// # Errors
    ///
    /// Returns [`PromptError`] for unreadable or invalid templates and for `.jinja` files that no role uses.
    pub fn load(folder: Option<&Path>) -> Result<Self, PromptError> {
        if let Some(folder) = folder {
            reject_unknown_files(folder)?;
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(1_000_000));
        let mut hashes = Vec::new();
        for role in PromptRole::ALL {
            let path = folder.map(|folder| folder.join(format!("{}.jinja", role.name())));
            let (source, path) = match path.filter(|path| path.exists()) {
                None => (role.default_source().to_owned(), PathBuf::from(role.name())),
                Some(path) => (
                    std::fs::read_to_string(&path)
                        .map_err(|error| PromptError { path: path.clone(), reason: error.to_string() })?,
                    path,
                ),
            };
            let wrong = |problem: String| PromptError { path: path.clone(), reason: problem };
            if !source.contains("problem") {
                return Err(wrong("does not use `{{ problem }}`".to_owned()));
            }
            hashes.push(ContentId::from_parts(&["prompt", &source]));
            environment
                .add_template_owned(role.name(), source.trim_end().to_owned())
                .map_err(|error| wrong(error.to_string()))?;
        }
        Ok(Self { environment: Arc::new(environment), hashes: Arc::new(hashes) })
    }

    /// Returns the hash of a template's source.
    pub fn template_hash(&self, role: PromptRole) -> ContentId {
        self.hashes[PromptRole::ALL.iter().position(|other| *other == role).unwrap_or_default()].clone()
    }

    fn render(&self, role: PromptRole, problem: &Problem, completion: &str) -> Result<String, String> {
        self.environment
            .get_template(role.name())
            .and_then(|template| {
                template.render(context! {
                    problem => problem.problem.as_str(),
                    answer => problem.answer.as_deref(),
                    completion => completion,
                    tasks => TASKS.map(|(name, _)| name),
                })
            })
            .map_err(|error| format!("prompt `{}`: {error}", role.name()))
    }

    /// Renders the prompt for a problem without a completion.
    pub fn render_for_problem(&self, role: PromptRole, problem: &Problem) -> Result<String, String> {
        self.render(role, problem, "")
    }

    /// Renders the prompt for a problem and a completion.
    pub fn render_for_completion(
        &self,
        role: PromptRole,
        problem: &Problem,
        completion: &str,
    ) -> Result<String, String> {
        self.render(role, problem, completion)
    }
}

/// Rejects a folder with a `.jinja` file that no role uses, since its name is probably misspelled.
fn reject_unknown_files(folder: &Path) -> Result<(), PromptError> {
    let wrong = |path: &Path, problem: String| PromptError { path: path.to_owned(), reason: problem };
    let entries = std::fs::read_dir(folder).map_err(|error| wrong(folder, error.to_string()))?;
    for entry in entries {
        let path = entry.map_err(|error| wrong(folder, error.to_string()))?.path();
        let is_prompt = path.extension().is_some_and(|extension| extension == "jinja");
        let stem = path.file_stem().unwrap_or_default();
        if is_prompt && !PromptRole::ALL.iter().any(|role| stem == role.name()) {
            let known = PromptRole::ALL.map(|role| format!("{}.jinja", role.name())).join(", ");
            return Err(wrong(&path, format!("is no prompt; there are {known}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_prompts_render() {
        let prompts = PromptTemplates::load(None).unwrap();
        let problem = Problem::new("1 + 1?", Some("2".into()), "s");
        assert!(prompts.render_for_problem(PromptRole::Classify, &problem).unwrap().contains("Code Debug"));
        for role in PromptRole::ALL {
            assert!(prompts.render(role, &problem, "trace").unwrap().contains("1 + 1?"));
        }
    }

    #[test]
    fn error_names_an_unknown_prompt_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("verify.jinja");
        potstill_shared::durable::write_file(&file, b"{{ problem }}").unwrap();
        let said = PromptTemplates::load(Some(folder.path())).err().unwrap().to_string();
        assert!(said.contains("verify.jinja") && said.contains("process.jinja"), "{said}");
    }
}
