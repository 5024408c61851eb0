//! Who may do what: roles as they stand in a manifest.

use serde_json::Value;

/// The roles that folders of `k8s/` hold.
pub fn granted(folders: &[&str]) -> Vec<String> {
    let read = |folder: &&str| {
        std::fs::read_to_string(crate::programs::root().join("k8s").join(folder).join("rbac.yaml")).unwrap()
    };
    folders.iter().map(read).collect()
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    pub verb: &'static str,
    /// API group; empty for the core.
    pub group: String,
    /// Plural, with the subresource after a slash.
    pub resource: String,
    /// The object; none for a list.
    pub name: Option<String>,
}

/// The rules of a role.
#[derive(Debug, Clone)]
pub struct Rights {
    /// None for one who may do everything.
    rules: Option<Vec<Value>>,
}

impl Rights {
    /// Everything.
    pub fn all() -> Self {
        Self { rules: None }
    }

    /// The rights of all roles in these manifests.
    pub fn of(manifests: &[String]) -> Self {
        let documents: Vec<Value> =
            manifests.iter().flat_map(|text| serde_saphyr::from_multiple::<Value>(text).unwrap()).collect();
        let roles = documents.iter().filter(|object| object["kind"] == "Role");
        Self { rules: Some(roles.flat_map(|role| role["rules"].as_array().unwrap().clone()).collect()) }
    }

    /// Whether a rule grants it.
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
                // A rule for names grants nothing that has none, such as a list or a creation.
                && named.is_none_or(|names| {
                    attempt.verb != "create" && attempt.name.as_ref().is_some_and(|name| names.iter().any(|n| n == name))
                })
        })
    }
}
