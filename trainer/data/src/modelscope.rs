//! ModelScope: resolves addresses `ms://datasets/OWNER/NAME[@REVISION]/FILE` to local files. FILE may contain `*`.
//!
//! ModelScope gives no commit for a branch, so the SHA-256 of a file identifies its version, where the hub lists one.
//! Each download is checked against its SHA-256. An interrupted download resumes. Without a network, cached files are
//! used. The environment variables `MODELSCOPE_ENDPOINT`, `MODELSCOPE_CACHE` and `MODELSCOPE_API_TOKEN` apply.
//! Deliberately absent: repositories of models, uploads.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use potstill_shared::durable::{create_folder, open_for_append, publish_file, remove_file, write_file};
use serde::{Deserialize, Serialize};

use crate::remote::{HubError, LocatedFile, is_contained_path, matches_glob, sha256_hex};

/// URL scheme of ModelScope.
pub(crate) const SCHEME: &str = "ms://";
/// Files per page of a listing.
const PAGE_SIZE: usize = 200;
/// Largest number of pages that are requested.
const MAX_PAGES: usize = 50;
/// Largest page of a listing, in bytes.
const MAX_LISTING_BYTES: u64 = 16 << 20;

/// Entry of the hub's file listing. A size of 0 or an empty hash means that the hub gives none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedFile {
    path: String,
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    sha256: String,
}

/// Parsed address `ms://…`.
struct ModelScopeAddress {
    text: String,
    repo: String,
    revision: String,
    file: String,
}

impl ModelScopeAddress {
    fn parse(text: &str) -> Result<Self, HubError> {
        let wrong = |problem: &str| HubError { address: text.to_owned(), reason: problem.to_owned() };
        let form = "is not of the form ms://datasets/OWNER/NAME[@REVISION]/FILE";
        let rest = text.strip_prefix("ms://datasets/").ok_or_else(|| wrong(form))?;
        let mut parts = rest.splitn(3, '/');
        let (Some(owner), Some(name), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong(form));
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "master"));
        // Owner, name and revision become folders of the cache, so path traversal must be impossible.
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        if ![owner, name, revision].into_iter().all(plain) || file.is_empty() {
            return Err(wrong(form));
        }
        if !is_contained_path(file) {
            return Err(wrong("the file's path must stay inside the repository"));
        }
        let (text, repo, revision, file) =
            (text.to_owned(), format!("{owner}/{name}"), revision.to_owned(), file.to_owned());
        Ok(Self { text, repo, revision, file })
    }

    fn error(&self, problem: impl std::fmt::Display) -> HubError {
        HubError { address: self.text.clone(), reason: problem.to_string() }
    }

    /// Returns the cache folder of this revision.
    fn cache_folder(&self) -> PathBuf {
        let home = std::env::var_os("HOME").unwrap_or_default();
        let root = match std::env::var_os("MODELSCOPE_CACHE") {
            Some(folder) if !folder.is_empty() => PathBuf::from(folder),
            _ => Path::new(&home).join(".cache/modelscope"),
        };
        root.join("potstill/datasets").join(&self.repo).join(&self.revision)
    }

    fn located(&self, file: &ListedFile, path: PathBuf) -> LocatedFile {
        let hash = if file.sha256.is_empty() {
            String::new()
        } else {
            format!("#{}", &file.sha256[..16.min(file.sha256.len())])
        };
        LocatedFile {
            shown: format!("{SCHEME}datasets/{}@{}/{}{hash}", self.repo, self.revision, file.path),
            path,
        }
    }
}

/// Returns the local files that an address matches. Downloads files that are not in the cache.
pub(crate) fn resolve(text: &str) -> Result<Vec<LocatedFile>, HubError> {
    let address = ModelScopeAddress::parse(text)?;
    let cache = address.cache_folder();
    let listing = cache.join(".listing.json");
    let hub = ModelScopeClient::new(&address);
    let listed = match hub.list_files() {
        Ok(listed) => listed,
        Err(error) => {
            // The hub is unreachable: the cache serves, provided that every matching file is cached.
            let kept = std::fs::read(&listing).ok();
            let kept: Option<Vec<ListedFile>> = kept.and_then(|text| serde_json::from_slice(&text).ok());
            let files = kept.map(|kept| matching_files(&address, kept)).unwrap_or_default();
            let path = |file: &ListedFile| cache.join(&file.path);
            if files.is_empty() || !files.iter().all(|file| path(file).exists()) {
                return Err(error);
            }
            tracing::warn!(
                address = text,
                problem = error.reason,
                "the hub cannot be asked; read from the cache"
            );
            return Ok(files.iter().map(|file| address.located(file, path(file))).collect());
        }
    };
    let files = matching_files(&address, listed.clone());
    if files.is_empty() {
        let some: Vec<String> = listed.iter().take(8).map(|file| format!("`{}`", file.path)).collect();
        return Err(address.error(format!("no such file at this revision; there are {}", some.join(", "))));
    }
    let mut located = Vec::with_capacity(files.len());
    for file in &files {
        let path = cache.join(&file.path);
        if !has_listed_size(&path, file) {
            hub.download(file, &path)?;
        }
        located.push(address.located(file, path));
    }
    let text = serde_json::to_vec(&listed).map_err(|error| address.error(error))?;
    write_file(&listing, &text).map_err(|error| address.error(error))?;
    Ok(located)
}

fn matching_files(address: &ModelScopeAddress, listed: Vec<ListedFile>) -> Vec<ListedFile> {
    let mut files: Vec<ListedFile> = listed
        .into_iter()
        .filter(|file| {
            file.r#type != "tree" && is_contained_path(&file.path) && matches_glob(&address.file, &file.path)
        })
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

/// Returns whether a file exists with its listed size. The hash was checked at download and is not computed again.
fn has_listed_size(path: &Path, file: &ListedFile) -> bool {
    std::fs::metadata(path).is_ok_and(|found| file.size == 0 || found.len() == file.size)
}

/// API client of one dataset repository.
struct ModelScopeClient<'a> {
    address: &'a ModelScopeAddress,
    agent: ureq::Agent,
    base: String,
    token: Option<String>,
}

impl<'a> ModelScopeClient<'a> {
    fn new(address: &'a ModelScopeAddress) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint =
            variable("MODELSCOPE_ENDPOINT").unwrap_or_else(|| "https://www.modelscope.cn".to_owned());
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .build();
        Self {
            address,
            agent: config.into(),
            base: format!("{}/api/v1/datasets/{}/repo", endpoint.trim_end_matches('/'), address.repo),
            token: variable("MODELSCOPE_API_TOKEN"),
        }
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        request.call().map_err(|error| {
            let advice = match &error {
                ureq::Error::StatusCode(401 | 403) => "; it is private: set MODELSCOPE_API_TOKEN",
                ureq::Error::StatusCode(404) => "; the dataset or the revision is not there",
                _ => "",
            };
            self.address.error(format!("{error}{advice}"))
        })
    }

    fn list_files(&self) -> Result<Vec<ListedFile>, HubError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct ListingResponse {
            data: Option<ListingPage>,
            #[serde(default)]
            message: String,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct ListingPage {
            files: Vec<ListedFile>,
        }
        let mut listed: Vec<ListedFile> = Vec::new();
        for page in 1..=MAX_PAGES {
            let url = format!(
                "{}/tree?Revision={}&Recursive=true&PageSize={PAGE_SIZE}&PageNumber={page}",
                self.base, self.address.revision
            );
            let mut answer = self.get(&url, 0)?;
            let read = answer.body_mut().with_config().limit(MAX_LISTING_BYTES).read_to_vec();
            let text = read.map_err(|error| self.address.error(error))?;
            let answer: ListingResponse = serde_json::from_slice(&text).map_err(|error| {
                self.address.error(format!("the hub's listing is not understood: {error}"))
            })?;
            let page = answer.data.ok_or_else(|| self.address.error(&answer.message))?;
            let (count, before) = (page.files.len(), listed.len());
            for file in page.files {
                if !listed.contains(&file) {
                    listed.push(file);
                }
            }
            // An endpoint without paging returns the first page again.
            if count < PAGE_SIZE || listed.len() == before {
                break;
            }
        }
        Ok(listed)
    }

    fn download(&self, file: &ListedFile, path: &Path) -> Result<(), HubError> {
        let failed = |error: &dyn std::fmt::Display| self.address.error(format!("`{}`: {error}", file.path));
        create_folder(path.parent().unwrap_or(Path::new("."))).map_err(|error| failed(&error))?;
        let part = path.with_extension("part");
        let begun = std::fs::metadata(&part).map_or(0, |found| found.len());
        let encoded: String = file.path.bytes().map(percent_encode).collect();
        let url = format!("{}?Source=SDK&Revision={}&FilePath={encoded}", self.base, self.address.revision);
        let mut answer = self.get(&url, begun)?;
        if begun > 0 && answer.status() != 206 {
            // The server ignored the range and sends the file from its start.
            remove_file(&part).map_err(|error| failed(&error))?;
        }
        let mut out = open_for_append(&part).map_err(|error| failed(&error))?;
        // One byte beyond the listed size suffices to detect a file that is too long.
        let most = if file.size == 0 { u64::MAX } else { file.size + 1 };
        let mut body = answer.body_mut().as_reader().take(most);
        let copied = std::io::copy(&mut body, &mut out).and_then(|_| std::io::Write::flush(&mut out));
        copied.map_err(|error| failed(&format!("{error}; the same command goes on with it")))?;
        drop(out);
        let length = std::fs::metadata(&part).map_or(0, |found| found.len());
        if file.size > 0 && length < file.size {
            return Err(failed(&format!(
                "{length} of {} bytes arrived; the same command goes on with it",
                file.size
            )));
        }
        let fault = if file.size > 0 && length > file.size {
            Some(format!("{length} instead of {} bytes arrived", file.size))
        } else if file.sha256.is_empty() {
            None
        } else {
            let found = sha256_hex(&part).map_err(|error| failed(&error))?;
            (found != file.sha256).then(|| "its SHA-256 is not the one that the hub names".to_owned())
        };
        if let Some(fault) = fault {
            remove_file(&part).map_err(|error| failed(&error))?;
            return Err(failed(&format!("{fault}; it was thrown away, try again")));
        }
        publish_file(&part, path).map_err(|error| failed(&error))
    }
}

/// Percent-encodes one byte of a path for a query (RFC 3986, section 2.1).
fn percent_encode(byte: u8) -> String {
    if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
        char::from(byte).to_string()
    } else {
        format!("%{byte:02X}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_valid_addresses_and_rejects_others() {
        let address =
            ModelScopeAddress::parse("ms://datasets/AI-ModelScope/gsm8k@v1/main/*.parquet").unwrap();
        assert_eq!((address.repo.as_str(), address.revision.as_str()), ("AI-ModelScope/gsm8k", "v1"));
        assert_eq!(ModelScopeAddress::parse("ms://datasets/a/b/c.json").unwrap().revision, "master");
        for wrong in [
            "ms://models/a/b/c",
            "ms://datasets/a/b",
            "ms://datasets/../b/c",
            "ms://datasets/a/b/../c",
            "ms://datasets/a/b@/c",
        ] {
            assert!(ModelScopeAddress::parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!("a b/ü".bytes().map(percent_encode).collect::<String>(), "a%20b/%C3%BC");
    }
}
