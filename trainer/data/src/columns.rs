//! Parquet writer for JSON rows. Values are shredded into columns with repetition and definition levels (Dremel,
//! Melnik et al. 2010), in Zstandard-compressed row groups of bounded size.
//!
//! Exists so that exported datasets load without conversion. Deliberately absent: reading Parquet (`rows`).

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use potstill_shared::durable::{DurableError, write_file_with};
use serde_json::Value;

/// Rows per row group, and rows in memory at once.
const ROWS_PER_GROUP: usize = 2000;

/// Type of a column. Every value is optional.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnType {
    /// UTF-8 string. Values that are not strings are written as JSON.
    Text,
    /// Signed 64-bit integer.
    Int,
    /// 64-bit floating-point number.
    Double,
    /// Boolean.
    Bool,
    /// List of values of one type.
    List(Box<ColumnType>),
    /// Group of named fields.
    Fields(Vec<(&'static str, ColumnType)>),
}

impl ColumnType {
    /// Returns the type of a list with elements of this type.
    pub fn into_list(self) -> Self {
        Self::List(Box::new(self))
    }

    fn leaf_count(&self) -> usize {
        match self {
            Self::List(inner) => inner.leaf_count(),
            Self::Fields(fields) => fields.iter().map(|(_, kind)| kind.leaf_count()).sum(),
            _ => 1,
        }
    }

    fn schema(&self, name: &str) -> parquet::errors::Result<Type> {
        let leaf = |physical, logical| {
            Type::primitive_type_builder(name, physical)
                .with_repetition(Repetition::OPTIONAL)
                .with_logical_type(logical)
                .build()
        };
        match self {
            Self::Text => leaf(Physical::BYTE_ARRAY, Some(LogicalType::String)),
            Self::Int => leaf(Physical::INT64, None),
            Self::Double => leaf(Physical::DOUBLE, None),
            Self::Bool => leaf(Physical::BOOLEAN, None),
            Self::List(inner) => {
                let repeated = Type::group_type_builder("list")
                    .with_repetition(Repetition::REPEATED)
                    .with_fields(vec![Arc::new(inner.schema("element")?)])
                    .build()?;
                Type::group_type_builder(name)
                    .with_repetition(Repetition::OPTIONAL)
                    .with_converted_type(ConvertedType::LIST)
                    .with_logical_type(Some(LogicalType::List))
                    .with_fields(vec![Arc::new(repeated)])
                    .build()
            }
            Self::Fields(fields) => Type::group_type_builder(name)
                .with_repetition(Repetition::OPTIONAL)
                .with_fields(schemas(fields)?)
                .build(),
        }
    }
}

fn schemas(fields: &[(&'static str, ColumnType)]) -> parquet::errors::Result<Vec<Arc<Type>>> {
    fields.iter().map(|(name, kind)| Ok(Arc::new(kind.schema(name)?))).collect()
}

/// Values of one leaf column, without nulls.
enum LeafValues {
    Text(Vec<ByteArray>),
    Int(Vec<i64>),
    Double(Vec<f64>),
    Bool(Vec<bool>),
}

/// Leaf column with its values and levels.
struct LeafColumn {
    values: LeafValues,
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

/// Appends an empty leaf column for each leaf of the given fields, in schema order.
fn append_leaf_columns(fields: &[(&'static str, ColumnType)], leaves: &mut Vec<LeafColumn>) {
    for (_, kind) in fields {
        let mut kind = kind;
        while let ColumnType::List(inner) = kind {
            kind = inner;
        }
        let values = match kind {
            ColumnType::Fields(fields) => {
                append_leaf_columns(fields, leaves);
                continue;
            }
            ColumnType::Int => LeafValues::Int(Vec::new()),
            ColumnType::Double => LeafValues::Double(Vec::new()),
            ColumnType::Bool => LeafValues::Bool(Vec::new()),
            ColumnType::Text | ColumnType::List(_) => LeafValues::Text(Vec::new()),
        };
        leaves.push(LeafColumn { values, definition: Vec::new(), repetition: Vec::new() });
    }
}

/// Levels of a value (Dremel): the defined ancestors on its path, the list that continues, and the number of lists
/// around the value.
#[derive(Clone, Copy)]
struct Levels {
    definition: i16,
    repetition: i16,
    lists: i16,
}

/// Appends a value to the leaf columns of its type. A value of another type becomes null.
fn shred(kind: &ColumnType, value: Option<&Value>, place: Levels, leaves: &mut [LeafColumn]) {
    let inside = Levels { definition: place.definition + 1, ..place };
    match (kind, value.filter(|value| !value.is_null())) {
        (_, None) => push_null(place, leaves),
        (ColumnType::Fields(fields), Some(value)) => {
            let mut rest = leaves;
            for (name, kind) in fields {
                let (mine, others) = rest.split_at_mut(kind.leaf_count());
                shred(kind, value.get(name), inside, mine);
                rest = others;
            }
        }
        (ColumnType::List(inner), Some(value)) => {
            let elements = value.as_array().map(Vec::as_slice).unwrap_or_default();
            if elements.is_empty() {
                push_null(inside, leaves);
            }
            let lists = place.lists + 1;
            for (at, element) in elements.iter().enumerate() {
                let repetition = if at == 0 { place.repetition } else { lists };
                shred(
                    inner,
                    Some(element),
                    Levels { definition: place.definition + 2, repetition, lists },
                    leaves,
                );
            }
        }
        (_, Some(value)) => {
            let Some(leaf) = leaves.first_mut() else { return };
            let fits = match &mut leaf.values {
                LeafValues::Text(values) => {
                    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    values.push(text.as_str().into());
                    true
                }
                LeafValues::Int(values) => value.as_i64().map(|number| values.push(number)).is_some(),
                LeafValues::Double(values) => value.as_f64().map(|number| values.push(number)).is_some(),
                LeafValues::Bool(values) => value.as_bool().map(|truth| values.push(truth)).is_some(),
            };
            leaf.definition.push(if fits { inside.definition } else { place.definition });
            leaf.repetition.push(place.repetition);
        }
    }
}

fn push_null(place: Levels, leaves: &mut [LeafColumn]) {
    for leaf in leaves {
        leaf.definition.push(place.definition);
        leaf.repetition.push(place.repetition);
    }
}

/// Writes rows as a Parquet file, atomically, and returns their number. Fields without a column are ignored.
///
/// # Errors
///
/// Returns an error if the file cannot be written or if `rows` yields an error.
pub fn write_parquet<E: std::fmt::Display>(
    path: &Path,
    columns: &[(&'static str, ColumnType)],
    rows: impl Iterator<Item = Result<Value, E>>,
) -> Result<usize, DurableError> {
    let mut count = 0;
    write_file_with(path, |file| {
        count = write_row_groups(file, columns, rows).map_err(std::io::Error::other)?;
        Ok(())
    })?;
    Ok(count)
}

fn write_row_groups<E: std::fmt::Display>(
    file: &mut (impl Write + Send),
    columns: &[(&'static str, ColumnType)],
    rows: impl Iterator<Item = Result<Value, E>>,
) -> Result<usize, Box<dyn std::error::Error + Send + Sync>> {
    let schema = Type::group_type_builder("schema").with_fields(schemas(columns)?).build()?;
    let properties =
        WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties))?;
    let mut rows = rows.peekable();
    let mut count = 0;
    while rows.peek().is_some() {
        let mut leaves = Vec::new();
        append_leaf_columns(columns, &mut leaves);
        for row in rows.by_ref().take(ROWS_PER_GROUP) {
            let row = row.map_err(|error| error.to_string())?;
            let mut rest = leaves.as_mut_slice();
            for (name, kind) in columns {
                let (mine, others) = rest.split_at_mut(kind.leaf_count());
                shred(kind, row.get(name), Levels { definition: 0, repetition: 0, lists: 0 }, mine);
                rest = others;
            }
            count += 1;
        }
        let mut group = writer.next_row_group()?;
        for leaf in &leaves {
            let Some(mut column) = group.next_column()? else { break };
            let (definition, repetition) = (Some(&leaf.definition[..]), Some(&leaf.repetition[..]));
            match &leaf.values {
                LeafValues::Text(values) => {
                    column.typed::<ByteArrayType>().write_batch(values, definition, repetition)?
                }
                LeafValues::Int(values) => {
                    column.typed::<Int64Type>().write_batch(values, definition, repetition)?
                }
                LeafValues::Double(values) => {
                    column.typed::<DoubleType>().write_batch(values, definition, repetition)?
                }
                LeafValues::Bool(values) => {
                    column.typed::<BoolType>().write_batch(values, definition, repetition)?
                }
            };
            column.close()?;
        }
        group.close()?;
    }
    writer.close()?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn columns() -> Vec<(&'static str, ColumnType)> {
        let judged = ColumnType::Fields(vec![("level", ColumnType::Int), ("judge", ColumnType::Text)]);
        let trace = ColumnType::Fields(vec![
            ("thought", ColumnType::Text),
            ("right", ColumnType::Bool),
            ("rv", judged),
        ]);
        vec![
            ("question", ColumnType::Text),
            ("share", ColumnType::Double),
            ("tags", ColumnType::Text.into_list()),
            ("traces", trace.into_list()),
            ("grid", ColumnType::Int.into_list().into_list()),
        ]
    }

    fn back(rows: &[Value]) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let given = rows.iter().cloned().map(Ok::<_, String>);
        assert_eq!(write_parquet(&path, &columns(), given).unwrap(), rows.len());
        let read = crate::rows::open_table(&path).unwrap();
        read.map(|row| Value::Object(row.unwrap().fields.unwrap())).collect()
    }

    fn trace() -> impl Strategy<Value = Value> {
        let level = prop_oneof![
            Just(Value::Null),
            (0i64..9, any::<bool>()).prop_map(
                |(level, named)| json!({ "level": level, "judge": if named { json!("j") } else { Value::Null } })
            )
        ];
        ("[a-zé\n]{0,6}", any::<Option<bool>>(), level)
            .prop_map(|(thought, right, rv)| json!({ "thought": thought, "right": right, "rv": rv }))
    }

    fn row() -> impl Strategy<Value = Value> {
        let tags = prop::option::of(prop::collection::vec(prop::option::of("[a-c]{0,3}"), 0..4));
        let traces = prop::option::of(prop::collection::vec(trace(), 0..4));
        let grid = prop::option::of(prop::collection::vec(
            prop::option::of(prop::collection::vec(prop::option::of(-5i64..5), 0..3)),
            0..3,
        ));
        (prop::option::of("[a-z]{0,9}"), prop::option::of(-4i32..4), tags, traces, grid).prop_map(
            |(question, share, tags, traces, grid)| {
                let share = share.map(|share| f64::from(share) / 4.0);
                json!({ "question": question, "share": share, "tags": tags, "traces": traces, "grid": grid })
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn written_rows_are_read_back_unchanged(rows in prop::collection::vec(row(), 0..12)) {
            prop_assert_eq!(back(&rows), rows);
        }
    }

    #[test]
    fn rows_of_several_row_groups_form_one_table() {
        let rows: Vec<Value> = (0..ROWS_PER_GROUP * 2 + 3)
            .map(|n| json!({ "question": n.to_string(), "share": null, "tags": ["a"], "traces": [], "grid": null }))
            .collect();
        assert_eq!(back(&rows), rows);
    }
}
