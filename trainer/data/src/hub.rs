//! Hugging Face Hub: resolves addresses `hf://[datasets/]OWNER/NAME[@REVISION]/FILE` (the form of fsspec, DuckDB and
//! Polars) to local files. FILE may contain `*`.
//!
//! The revision is resolved to a commit first, so that records name the exact version. Files lie in the cache of
//! Python's `huggingface_hub`; without a network, cached files are used. The environment variables `HF_ENDPOINT`,
//! `HF_HOME`, `HF_TOKEN` (or the token file of `hf auth login`) and `HF_HUB_OFFLINE` apply. Deliberately absent:
//! uploads.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};
use potstill_shared::durable::{create_folder, write_file};

use crate::modelscope;
pub use crate::remote::{HubError, LocatedFile};
use crate::remote::{is_contained_path, matches_glob, sha256_hex};

/// URL scheme of the hub.
const SCHEME: &str = "hf://";
/// Largest number of files that one address may match.
const MAX_FILES: usize = 10_000;

/// Returns whether a path is an address of the Hugging Face Hub or of [ModelScope](crate::modelscope).
pub fn is_hub_address(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.starts_with(SCHEME) || text.starts_with(modelscope::SCHEME)
}

/// Returns the local files that a path or hub address refers to. Downloads files that are not in the cache.
///
/// # Errors
///
/// Returns [`HubError`] if an address is invalid, matches no file, or its files are neither reachable nor cached.
pub fn resolve(path: &Path) -> Result<Vec<LocatedFile>, HubError> {
    let shown = path.to_string_lossy().into_owned();
    if !is_hub_address(path) {
        return Ok(vec![LocatedFile { shown, path: path.to_owned() }]);
    }
    if shown.starts_with(modelscope::SCHEME) {
        return modelscope::resolve(&shown);
    }
    let address = HubAddress::parse(&shown)?;
    address.fetch(
        Cache::from_env(),
        std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0")),
    )
}

/// Returns the license from the card (`README.md`) of an address's repository. `None` if there is none or the path is
/// not an address.
pub fn license(path: &Path) -> Option<String> {
    let text = path.to_string_lossy();
    // The card lies at the top of the repository: SCHEME [datasets/] OWNER/NAME[@REVISION] / README.md.
    let (scheme, rest) = text.split_once("://").filter(|_| is_hub_address(path))?;
    let parts = if rest.starts_with("datasets/") { 3 } else { 2 };
    let repository: Vec<&str> = rest.split('/').take(parts).collect();
    let card = format!("{scheme}://{}/README.md", repository.join("/"));
    let card = resolve(Path::new(&card)).ok()?.pop()?;
    license_from_card(&std::fs::read_to_string(card.path).ok()?)
}

/// Returns the `license` of a card's YAML front matter.
fn license_from_card(card: &str) -> Option<String> {
    let (front, _) = card.strip_prefix("---")?.split_once("\n---")?;
    let named = front.lines().find_map(|line| line.strip_prefix("license:"))?;
    let named = named.trim().trim_matches(['"', '\'', '[', ']']).trim();
    (!named.is_empty()).then(|| named.to_owned())
}

/// Parsed address `hf://…`.
#[derive(Debug, PartialEq, Eq)]
struct HubAddress {
    text: String,
    kind: &'static str,
    repo: String,
    revision: Option<String>,
    file: String,
}

impl HubAddress {
    fn parse(text: &str) -> Result<Self, HubError> {
        let wrong = |problem: &str| HubError { address: text.to_owned(), reason: problem.to_owned() };
        let form = "is not of the form hf://datasets/OWNER/NAME[@REVISION]/FILE";
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| wrong(form))?;
        let (kind, rest) = match rest.strip_prefix("datasets/") {
            Some(rest) => ("datasets/", rest),
            None => ("", rest),
        };
        let mut parts = rest.splitn(3, '/');
        let (Some(owner), Some(name), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong(form));
        };
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) => (name, Some(revision.to_owned())),
            None => (name, None),
        };
        // Owner, name and revision become folders of the cache, so path traversal must be impossible.
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        if !plain(owner) || !plain(name) || !revision.as_deref().is_none_or(plain) || file.is_empty() {
            return Err(wrong(form));
        }
        if !is_contained_path(file) {
            return Err(wrong("the file's path must stay inside the repository"));
        }
        let repo = format!("{owner}/{name}");
        Ok(Self { text: text.to_owned(), kind, repo, revision, file: file.to_owned() })
    }

    fn repo_at(&self, revision: &str) -> Repo {
        let kind = if self.kind.is_empty() { RepoType::Model } else { RepoType::Dataset };
        Repo::with_revision(self.repo.clone(), kind, revision.to_owned())
    }

    fn located(&self, commit: &str, file: &str, path: PathBuf) -> LocatedFile {
        LocatedFile { shown: format!("{SCHEME}{}{}@{commit}/{file}", self.kind, self.repo), path }
    }

    fn error(&self, problem: impl Into<String>) -> HubError {
        HubError { address: self.text.clone(), reason: problem.into() }
    }

    fn fetch(&self, cache: Cache, offline: bool) -> Result<Vec<LocatedFile>, HubError> {
        let revision = self.revision.as_deref().unwrap_or("main");
        if offline {
            return self.cached_files(&cache, revision)?.ok_or_else(|| {
                self.error("is not in the cache, and HF_HUB_OFFLINE is set; run once without it")
            });
        }
        let mut builder = ApiBuilder::from_env().with_progress(false).with_retries(3);
        if let Ok(token) = std::env::var("HF_TOKEN")
            && !token.trim().is_empty()
        {
            builder = builder.with_token(Some(token.trim().to_owned()));
        }
        let api = builder.build().map_err(|error| self.error(error.to_string()))?;
        let info = match api.repo(self.repo_at(revision)).info() {
            Ok(info) => info,
            Err(error) => {
                let problem = with_advice(&error.to_string());
                // The hub is unreachable: cached files are used, and their address still names the commit.
                return match self.cached_files(&cache, revision)? {
                    Some(located) => {
                        tracing::warn!(
                            address = self.text,
                            problem,
                            "the hub cannot be asked; read from the cache"
                        );
                        Ok(located)
                    }
                    None => Err(self.error(problem)),
                };
            }
        };
        if !is_commit(&info.sha) {
            return Err(self.error("the hub named no commit for this revision"));
        }
        let names: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let mut files: Vec<&String> =
            names.iter().filter(|name| is_contained_path(name) && matches_glob(&self.file, name)).collect();
        if files.is_empty() {
            let some = names.iter().take(8).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(self.error(format!("no such file at this revision; there are {some}")));
        }
        if files.len() > MAX_FILES {
            return Err(self.error(format!("names {} files; at most {MAX_FILES} are read", files.len())));
        }
        files.sort();
        let mut located = Vec::with_capacity(files.len());
        for file in files {
            let path = self.fetch_file(&api, &cache, &info.sha, file)?;
            located.push(self.located(&info.sha, file, path));
        }
        // Later offline runs need the list of names to know whether all files that match an address are cached.
        let listing = serde_json::to_vec(&names).map_err(|error| self.error(error.to_string()))?;
        let at = self.listing_path(&cache, &info.sha);
        create_folder(at.parent().unwrap_or(cache.path()))
            .and_then(|()| write_file(&at, &listing))
            .map_err(|error| self.error(format!("cannot write the cache: {error}")))?;
        // Written last, so that a branch in the cache never points at a commit with missing files.
        cache
            .repo(self.repo_at(revision))
            .create_ref(&info.sha)
            .map_err(|error| self.error(format!("cannot write the cache: {error}")))?;
        Ok(located)
    }

    /// Returns one file of a commit, from the cache or by download. A download is checked against its size and, where
    /// the hub gives one, its SHA-256.
    fn fetch_file(&self, api: &Api, cache: &Cache, commit: &str, file: &str) -> Result<PathBuf, HubError> {
        let failed = |error: &dyn std::fmt::Display| {
            self.error(format!("`{file}`: {}", with_advice(&error.to_string())))
        };
        let folder = cache.repo(self.repo_at(commit)).pointer_path(commit);
        let path = folder.join(file);
        if path.exists() {
            return Ok(path);
        }
        let repo = api.repo(self.repo_at(commit));
        let said = api.metadata(&repo.url(file)).map_err(|error| failed(&error))?;
        let path = repo.download(file).map_err(|error| failed(&error))?;
        let fault = match std::fs::metadata(&path) {
            Err(error) => Some(error.to_string()),
            Ok(found) if found.len() != said.size() as u64 => {
                Some(format!("{} of {} bytes arrived", found.len(), said.size()))
            }
            Ok(_)
                if said.etag().len() == 64
                    && sha256_hex(&path).map_err(|error| failed(&error))? != said.etag() =>
            {
                Some("its SHA-256 is not the one that the hub names".to_owned())
            }
            Ok(_) => None,
        };
        match fault {
            None => Ok(path),
            Some(fault) => {
                let blob = path.canonicalize().unwrap_or_else(|_| path.clone());
                for broken in [blob, path] {
                    let _gone = std::fs::remove_file(broken);
                }
                Err(failed(&format!("{fault}; it was thrown away, try again")))
            }
        }
    }

    /// Returns the path of the list of a commit's file names. The list lies beside the folders of Python's cache.
    fn listing_path(&self, cache: &Cache, commit: &str) -> PathBuf {
        cache.path().join(self.repo_at(commit).folder_name()).join("listings").join(format!("{commit}.json"))
    }

    /// Returns the cached files of a revision, or `None` if a file that the address matches is missing.
    fn cached_files(&self, cache: &Cache, revision: &str) -> Result<Option<Vec<LocatedFile>>, HubError> {
        let repo = cache.repo(self.repo_at(revision));
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let folder = cache.path().join(self.repo_at(revision).folder_name());
            match std::fs::read_to_string(folder.join("refs").join(revision)) {
                Ok(commit) if is_commit(commit.trim()) => commit.trim().to_owned(),
                _ => return Ok(None),
            }
        };
        let folder = repo.pointer_path(&commit);
        let listed: Option<Vec<String>> = std::fs::read(self.listing_path(cache, &commit))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let mut names = match listed {
            Some(names) => names,
            // Another program filled the cache and left no list, so only an address without `*` can be resolved.
            None => vec![self.file.clone()],
        };
        names.retain(|name| is_contained_path(name) && matches_glob(&self.file, name));
        names.sort();
        if names.is_empty() || !names.iter().all(|name| folder.join(name).exists()) {
            return Ok(None);
        }
        Ok(Some(names.iter().map(|name| self.located(&commit, name, folder.join(name))).collect()))
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns the hub's error message, with the next step for known HTTP statuses.
fn with_advice(problem: &str) -> String {
    let advice = if problem.contains("401") || problem.contains("403") {
        "; it is private or gated: accept its terms on the hub and set HF_TOKEN"
    } else if problem.contains("404") {
        "; the repository or the revision is not there"
    } else {
        ""
    };
    format!("{problem}{advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_valid_addresses_and_rejects_others() {
        let address = HubAddress::parse("hf://datasets/openai/gsm8k@abc/main/test-*.parquet").unwrap();
        assert_eq!(
            (address.repo.as_str(), address.revision.as_deref(), address.file.as_str()),
            ("openai/gsm8k", Some("abc"), "main/test-*.parquet")
        );
        assert_eq!(HubAddress::parse("hf://a/b/c.json").unwrap().kind, "");
        for wrong in [
            "hf://",
            "hf://datasets/a/b",
            "hf://datasets/../b/c",
            "hf://datasets/a/b@../../x/c",
            "hf://datasets/a/b/../c",
            "hf://datasets/a/b//c",
        ] {
            assert!(HubAddress::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn reads_the_license_from_the_front_matter() {
        let card = "---\nlanguage: en\nlicense: apache-2.0\n---\n# Name\nlicense: no";
        assert_eq!(license_from_card(card).as_deref(), Some("apache-2.0"));
        assert_eq!(license_from_card("---\nlicense: ['mit']\n---\n").as_deref(), Some("mit"));
        assert_eq!(license_from_card("# no front matter\nlicense: mit"), None);
        assert_eq!(license_from_card("---\ntags: a\n---\n"), None);
    }

    #[test]
    fn star_matches_any_text() {
        for (pattern, name, fits) in [
            ("a.jsonl", "a.jsonl", true),
            ("a.jsonl", "b.jsonl", false),
            ("data/*.parquet", "data/train-0.parquet", true),
            ("data/*.parquet", "data/readme.md", false),
            ("*test*.jsonl", "x/test-1.jsonl", true),
            ("a*a", "a", false),
            ("*", "anything/at/all", true),
        ] {
            assert_eq!(matches_glob(pattern, name), fits, "{pattern} {name}");
        }
    }
}
