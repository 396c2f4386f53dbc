//! Rows of Parquet files, read a page at a time.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Deepest nesting of a value.
const DEPTH_LIMIT: usize = 64;
/// A row group may be this many times as large as the file; real ones reach a hundred.
const EXPANSION_LIMIT: u64 = 10_000;

/// The rows of a file.
pub(super) struct Records {
    path: PathBuf,
    rows: RowIter<'static>,
    number: usize,
}

impl Records {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("opening", path))?;
        let size = file.metadata().map_err(Error::io("reading", path))?.len();
        let error = |reason: String| Error::Parquet {
            path: path.into(),
            row: 0,
            reason,
        };
        let rows = guarded(|| {
            let reader = SerializedFileReader::new(file).map_err(|e| e.to_string())?;
            check(&reader, size)?;
            Ok(RowIter::from_file_into(Box::new(reader)))
        })
        .map_err(error)?;
        Ok(Self {
            path: path.into(),
            rows,
            number: 0,
        })
    }

    pub(super) fn next_record(&mut self) -> Result<Option<(usize, Map<String, Value>)>> {
        self.number += 1;
        let rows = &mut self.rows;
        let record = guarded(|| match rows.next() {
            None => Ok(None),
            Some(Ok(row)) => object(&row, 0).map(Some),
            Some(Err(error)) => Err(error.to_string()),
        });
        match record {
            Ok(record) => Ok(record.map(|columns| (self.number, columns))),
            Err(reason) => Err(Error::Parquet {
                path: self.path.clone(),
                row: self.number,
                reason,
            }),
        }
    }
}

/// The parquet library panics on some damaged files. That is an error here; the reader is not
/// used after one.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!(
            "damaged file: {}",
            message.unwrap_or("no reason given")
        ))
    })
}

/// Refuses metadata that cannot be true of a file of this size.
fn check(reader: &SerializedFileReader<File>, size: u64) -> Result<(), String> {
    let metadata = reader.metadata();
    for (i, group) in metadata.row_groups().iter().enumerate() {
        for column in group.columns() {
            let name = column.column_path().string();
            let (start, length) = (
                column
                    .dictionary_page_offset()
                    .unwrap_or(column.data_page_offset()),
                column.compressed_size(),
            );
            let end = start.checked_add(length);
            if start < 0 || length < 0 || end.is_none_or(|end| end as u64 > size) {
                return Err(format!(
                    "row group {i}, column `{name}`: bytes {start} + {length} of a file of {size}"
                ));
            }
            let values = u64::try_from(column.uncompressed_size()).ok();
            if values.is_none_or(|bytes| bytes > size.saturating_mul(EXPANSION_LIMIT)) {
                return Err(format!(
                    "row group {i}, column `{name}`: {} bytes from a file of {size}",
                    column.uncompressed_size()
                ));
            }
        }
    }
    Ok(())
}

fn object(row: &Row, depth: usize) -> Result<Map<String, Value>, String> {
    row.get_column_iter()
        .map(|(name, field)| Ok((name.clone(), value(field, depth + 1)?)))
        .collect()
}

fn value(field: &Field, depth: usize) -> Result<Value, String> {
    if depth > DEPTH_LIMIT {
        return Err(format!("a value is nested more than {DEPTH_LIMIT} deep"));
    }
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => f32::from(*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers do not mark strings as such.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err("bytes that are not UTF-8".into()),
        },
        // Arrow's unions of object types: fields that a message does not have are null.
        Field::Group(row) => {
            let mut fields = object(row, depth)?;
            fields.retain(|_, value| !value.is_null());
            Value::Object(fields)
        }
        Field::ListInternal(list) => list
            .elements()
            .iter()
            .map(|item| value(item, depth + 1))
            .collect::<Result<Vec<Value>, String>>()?
            .into(),
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(key, item)| match value(key, depth + 1)? {
                Value::String(key) => Ok((key, value(item, depth + 1)?)),
                other => Err(format!("a map's key is {other}, not a string")),
            })
            .collect::<Result<Map<String, Value>, String>>()?
            .into(),
        other => return Err(format!("a value of an unsupported type: {other}")),
    })
}
