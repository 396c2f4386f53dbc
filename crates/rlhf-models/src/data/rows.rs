//! Rows of a file, one at a time.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::jsonl::Lines;
use super::{Format, Location, Row};
use crate::{Error, Result};

/// The rows of a JSONL or Parquet file. The format is that of the first row's columns; a later
/// row that lacks one is an error, and the iterator ends after an error. Columns that are null
/// count as absent.
pub struct Rows {
    source: Source,
    path: Arc<Path>,
    format: Format,
    next: Option<Result<Row>>,
}

enum Source {
    Jsonl(Lines),
    #[cfg(feature = "parquet")]
    Parquet(super::parquet::Records),
}

type Record = (usize, Map<String, Value>);

impl Source {
    fn next_record(&mut self) -> Result<Option<Record>> {
        let mut record = match self {
            Self::Jsonl(lines) => lines.next_record::<Map<String, Value>>()?,
            #[cfg(feature = "parquet")]
            Self::Parquet(records) => records.next_record()?,
        };
        if let Some((_, columns)) = &mut record {
            columns.retain(|_, value| !value.is_null());
        }
        Ok(record)
    }
}

impl Rows {
    /// Opens a file and finds out its format. A file whose name ends in `.parquet` is a Parquet
    /// file (with the feature `parquet`), any other is JSONL.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::UnknownFormat`], which lists the columns found and the formats
    /// known; [`Error::NoRecords`]; [`Error::NoParquet`] without the feature; what is wrong with
    /// the first row.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut source = match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("parquet") => open_parquet(path)?,
            _ => Source::Jsonl(Lines::open(path)?),
        };
        let Some((line, columns)) = source.next_record()? else {
            return Err(Error::NoRecords { path: path.into() });
        };
        let Some(format) = Format::detect(columns.keys().map(String::as_str)) else {
            return Err(Error::UnknownFormat {
                path: path.into(),
                columns: columns.keys().cloned().collect(),
            });
        };
        let path = path.into();
        let next = Some(Ok(row(format, &path, (line, columns))?));
        Ok(Self {
            source,
            path,
            format,
            next,
        })
    }

    /// What the file holds.
    pub fn format(&self) -> Format {
        self.format
    }

    fn read(&mut self) -> Option<Result<Row>> {
        match self.source.next_record() {
            Ok(record) => Some(row(self.format, &self.path, record?)),
            Err(error) => Some(Err(error)),
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let row = self.next.take()?;
        if row.is_ok() {
            self.next = self.read();
        }
        Some(row)
    }
}

fn row(format: Format, path: &Arc<Path>, (line, columns): Record) -> Result<Row> {
    let location = Location {
        path: Arc::clone(path),
        line,
    };
    Row::from_columns(format, columns, location).map_err(|(field, source)| Error::JsonLine {
        path: path.to_path_buf(),
        line,
        field,
        source,
    })
}

#[cfg(feature = "parquet")]
fn open_parquet(path: &Path) -> Result<Source> {
    super::parquet::Records::open(path).map(Source::Parquet)
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(path: &Path) -> Result<Source> {
    Err(Error::NoParquet { path: path.into() })
}
