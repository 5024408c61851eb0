//! Authorization: roles as in the manifests.

use serde_json::Value;

/// Returns the text of `rbac.yaml` in folders of `k8s/`.
pub fn granted(folders: &[&str]) -> Vec<String> {
    let read = |folder: &&str| {
        std::fs::read_to_string(crate::programs::root().join("k8s").join(folder).join("rbac.yaml")).unwrap()
    };
    folders.iter().map(read).collect()
}

/// A request to be authorized.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    pub verb: &'static str,
    /// API group; empty for the core group.
    pub group: String,
    /// Plural of the resource, with the subresource after a slash.
    pub resource: String,
    /// Name of the object; `None` for a list.
    pub name: Option<String>,
}

/// Rules of a role.
#[derive(Debug, Clone)]
pub struct Rights {
    /// `None` permits everything.
    rules: Option<Vec<Value>>,
}

impl Rights {
    /// Permits everything.
    pub fn all() -> Self {
        Self { rules: None }
    }

    /// Returns the rights of all roles in the manifests.
    pub fn of(manifests: &[String]) -> Self {
        let documents: Vec<Value> =
            manifests.iter().flat_map(|text| serde_saphyr::from_multiple::<Value>(text).unwrap()).collect();
        let roles = documents.iter().filter(|object| object["kind"] == "Role");
        Self { rules: Some(roles.flat_map(|role| role["rules"].as_array().unwrap().clone()).collect()) }
    }

    /// Returns whether a rule permits the request.
    pub fn grant(&self, attempt: &Attempt) -> bool {
        let Some(rules) = &self.rules else { return true };
        let holds = |rule: &Value, field: &str, value: &str| {
            rule[field].as_array().is_some_and(|list| list.iter().any(|entry| entry == value))
        };
        rules.iter().any(|rule| {
            let named = rule["resourceNames"].as_array();
            holds(rule, "apiGroups", &attempt.group)
                && holds(rule, "resources", &attempt.resource)
                && holds(rule, "verbs", attempt.verb)
                // A rule with names permits only requests with a name, so neither lists nor creations.
                && named.is_none_or(|names| {
                    attempt.verb != "create" && attempt.name.as_ref().is_some_and(|name| names.iter().any(|n| n == name))
                })
        })
    }
}
