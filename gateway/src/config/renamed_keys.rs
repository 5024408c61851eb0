//! Keys of earlier releases. A renamed key is accepted for one release, with a warning that names the new one.

use toml::{Table, Value};

/// A renamed key.
#[derive(Debug, Clone, Copy)]
pub struct RenamedKey {
    /// Path of the table that holds the key, with `[]` after the name of a list: `pools[].scale`. Empty for the root.
    pub table: &'static str,
    /// Name in the release before.
    pub old: &'static str,
    /// Name now.
    pub new: &'static str,
}

const fn renamed(table: &'static str, old: &'static str, new: &'static str) -> RenamedKey {
    RenamedKey { table, old, new }
}

/// All keys that were renamed since Potstill 0.1.
pub const RENAMED_KEYS: &[RenamedKey] = &[
    renamed("autoscale", "lease", "lease_name"),
    renamed("autoscale", "lease_s", "lease_duration_s"),
    renamed("autoscale", "trace_file", "load_trace_file"),
    renamed("pools[]", "balance", "load_balancing"),
    renamed("pools[].nodes[]", "slots", "max_concurrency"),
    renamed("pools[].hedge", "after_ms", "delay_ms"),
    renamed("pools[].scale", "slots", "max_concurrency"),
    renamed("pools[].scale", "cost", "cost_per_hour"),
    renamed("pools[].scale", "idle_s", "idle_timeout_s"),
    renamed("pools[].scale", "memory_s", "demand_window_s"),
    renamed("pools[].scale", "hold_s", "scale_down_delay_s"),
    renamed("pools[].scale", "hour_worth", "delay_cost_per_hour"),
    renamed("pools[].scale", "drain_s", "drain_timeout_s"),
    renamed("pools[].scale", "start_s", "startup_timeout_s"),
];

/// Gives all renamed keys of `document` their new names. Returns one warning per key, or an error for a key that stands there
/// under both names.
pub(super) fn rename_keys(document: &mut Table) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    for key in RENAMED_KEYS {
        let path: Vec<&str> = key.table.split('.').filter(|part| !part.is_empty()).collect();
        rename_in(document, &path, String::new(), key, &mut warnings)?;
    }
    Ok(warnings)
}

fn rename_in(
    table: &mut Table,
    path: &[&str],
    place: String,
    key: &RenamedKey,
    warnings: &mut Vec<String>,
) -> Result<(), String> {
    let Some((first, rest)) = path.split_first() else {
        if let Some(value) = table.remove(key.old) {
            if table.contains_key(key.new) {
                return Err(format!(
                    "`{place}{}` and `{place}{}` are one key; give `{}` alone",
                    key.old, key.new, key.new
                ));
            }
            table.insert(key.new.to_owned(), value);
            warnings.push(format!("`{place}{}` is now `{}`; the old name will be refused", key.old, key.new));
        }
        return Ok(());
    };
    let (name, is_list) = first.strip_suffix("[]").map_or((*first, false), |name| (name, true));
    match table.get_mut(name) {
        Some(Value::Table(inner)) if !is_list => {
            rename_in(inner, rest, format!("{place}{name}."), key, warnings)
        }
        Some(Value::Array(items)) if is_list => items
            .iter_mut()
            .enumerate()
            .filter_map(|(index, item)| Some((index, item.as_table_mut()?)))
            .try_for_each(|(index, item)| {
                rename_in(item, rest, format!("{place}{name}[{index}]."), key, warnings)
            }),
        // Another type is an error that reading the document reports.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_keys_in_tables_and_lists() {
        let mut document: Table = r#"
            [autoscale]
            lease = "l"
            [[pools]]
            model = "m"
            nodes = [{ url = "http://a", slots = 3 }, { url = "http://b" }]
            [pools.scale]
            memory_s = 60
        "#
        .parse()
        .unwrap();
        let warnings = rename_keys(&mut document).unwrap();
        assert_eq!(document["autoscale"]["lease_name"].as_str(), Some("l"));
        assert_eq!(document["pools"][0]["nodes"][0]["max_concurrency"].as_integer(), Some(3));
        assert_eq!(document["pools"][0]["scale"]["demand_window_s"].as_integer(), Some(60));
        assert_eq!(warnings.len(), 3);
        assert!(
            warnings[1].contains("pools[0].nodes[0].slots") && warnings[1].contains("max_concurrency"),
            "{warnings:?}"
        );
        assert!(rename_keys(&mut document).unwrap().is_empty());
    }

    #[test]
    fn rejects_a_key_under_both_names() {
        let mut document: Table = "[autoscale]\nlease = \"a\"\nlease_name = \"b\"".parse().unwrap();
        assert!(rename_keys(&mut document).unwrap_err().contains("lease_name"));
    }
}
