//! Strict safetensors files: written atomically, read with every problem reported at once.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rlhf_core::Error as CoreError;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Kind, Tensor};

use crate::{Error, Result, ffi};

/// What one tensor of a file should have been.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Expected, but not in the file.
    Missing {
        /// Its name.
        name: String,
    },
    /// In the file, but not expected.
    Unexpected {
        /// Its name.
        name: String,
    },
    /// The shapes differ.
    Shape {
        /// Its name.
        name: String,
        /// Shape in the file.
        found: Vec<i64>,
        /// Shape that was expected.
        expected: Vec<i64>,
    },
    /// The kinds differ.
    Kind {
        /// Its name.
        name: String,
        /// Kind in the file.
        found: Kind,
        /// Kind that was expected.
        expected: Kind,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "{name}: missing"),
            Self::Unexpected { name } => write!(f, "{name}: not expected"),
            Self::Shape {
                name,
                found,
                expected,
            } => write!(f, "{name}: shape {found:?}, expected {expected:?}"),
            Self::Kind {
                name,
                found,
                expected,
            } => write!(f, "{name}: {found:?}, expected {expected:?}"),
        }
    }
}

/// Writes `tensors` of any kind to a safetensors file, byte for byte.
///
/// The file appears complete or not at all: it is written beside `path`, synced, and renamed over
/// what was there. Only one tensor at a time is copied to the host.
///
/// # Errors
/// [`Error::DuplicateName`], [`Error::UnsupportedKind`], or an I/O error.
pub fn save_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    // Largest elements first keeps every tensor aligned, which memory-mapping readers need.
    sorted
        .sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.kind().elt_size_in_bytes()), name));
    let header = header(path, &sorted)?;
    write_atomically(path, |file| {
        let io = |error| Error::from(CoreError::io("writing", path)(error));
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(io)?;
        file.write_all(&header).map_err(io)?;
        for (_, tensor) in sorted {
            file.write_all(&bytes_of(tensor)?).map_err(io)?;
        }
        Ok(())
    })
}

/// Reads all tensors of a safetensors file, sorted by name, on the CPU and as stored.
///
/// # Errors
/// If the file cannot be read, is damaged, or holds a kind that tch does not have.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let mut reader = Reader::open(path)?;
    let mut names: Vec<String> = reader.metadata.offset_keys();
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let tensor = reader.read(&name)?;
            Ok((name, tensor))
        })
        .collect()
}

/// Copies a file's tensors into `targets`, which must be the same in names, shapes and kinds.
///
/// # Errors
/// [`Error::TensorFile`] with every missing, unexpected or different tensor, or what
/// [`read_tensors`] fails with. Nothing is written to the targets then.
pub fn load_tensors_into(path: &Path, targets: &[(String, Tensor)]) -> Result<()> {
    copy_into(targets, &read_matching(path, targets)?)
}

/// The file's tensors in the order of `targets`, after checking that they correspond.
pub(crate) fn read_matching(path: &Path, targets: &[(String, Tensor)]) -> Result<Vec<Tensor>> {
    read_each(path, targets, false, |_, tensor| Ok(tensor))
}

/// [`read_matching`], each tensor given to `take` when it is read; `others` says that the file may
/// hold more.
pub(crate) fn read_each(
    path: &Path,
    targets: &[(String, Tensor)],
    others: bool,
    take: impl Fn(&str, Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut reader = Reader::open(path)?;
    let mut problems = reader.problems(targets)?;
    if others {
        problems.retain(|problem| !matches!(problem, TensorProblem::Unexpected { .. }));
    }
    if !problems.is_empty() {
        return Err(Error::TensorFile {
            path: path.to_path_buf(),
            problems,
        });
    }
    targets
        .iter()
        .map(|(name, _)| take(name, reader.read(name)?))
        .collect()
}

/// Copies into targets that are known to correspond.
pub(crate) fn copy_into(targets: &[(String, Tensor)], sources: &[Tensor]) -> Result<()> {
    let targets: Vec<&Tensor> = targets.iter().map(|(_, target)| target).collect();
    let sources: Vec<&Tensor> = sources.iter().collect();
    if targets.is_empty() {
        return Ok(());
    }
    ffi::copy_all(&targets, &sources)
}

/// Writes beside `path`, syncs, and renames, so that readers see the old content or the new.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let outcome = write_and_rename(path, &temporary, write);
    if outcome.is_err() {
        // The first error matters; a file that cannot be removed is only litter.
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

fn write_and_rename(
    path: &Path,
    temporary: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let file = File::create(temporary).map_err(CoreError::io("creating", temporary))?;
    let mut writer = BufWriter::new(file);
    write(&mut writer)?;
    let file = writer
        .into_inner()
        .map_err(|error| CoreError::io("writing", path)(error.into_error()))?;
    file.sync_all().map_err(CoreError::io("syncing", path))?;
    fs::rename(temporary, path).map_err(CoreError::io("renaming to", path))?;
    // The rename itself lives in the folder.
    if let Some(folder) = path.parent() {
        let folder = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(CoreError::io("syncing", folder))?;
    }
    Ok(())
}

fn header(path: &Path, sorted: &[&(String, Tensor)]) -> Result<Vec<u8>> {
    let mut names = HashSet::new();
    let mut infos = Vec::with_capacity(sorted.len());
    let mut start = 0;
    for (name, tensor) in sorted {
        if !names.insert(name) {
            return Err(Error::DuplicateName { name: name.clone() });
        }
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| Error::UnsupportedKind {
            name: name.clone(),
            kind: tensor.kind(),
        })?;
        let end = start + tensor.numel() * tensor.kind().elt_size_in_bytes();
        infos.push((
            name.clone(),
            TensorInfo {
                dtype,
                shape: tensor.size().iter().map(|&size| size as usize).collect(),
                data_offsets: (start, end),
            },
        ));
        start = end;
    }
    // transformers refuses files that do not say which framework they are of.
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let mut header = Metadata::new(Some(format), infos)
        .map_err(|error| error.to_string())
        .and_then(|metadata| serde_json::to_vec(&metadata).map_err(|error| error.to_string()))
        .map_err(|reason| corrupt(path, reason))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

/// An open safetensors file whose header has been checked against its length.
struct Reader<'a> {
    path: &'a Path,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let io = CoreError::io("reading", path);
        let (file, length) = File::open(path)
            .and_then(|file| {
                let length = file.metadata()?.len();
                Ok((file, length))
            })
            .map_err(io)?;
        let mut reader = Self {
            path,
            file,
            metadata: Metadata::new(None, Vec::new())
                .map_err(|error| corrupt(path, error.to_string()))?,
            data_start: 0,
        };
        if length < 8 {
            return Err(corrupt(
                path,
                format!("{length} bytes are too few for a safetensors file"),
            ));
        }
        let header_length = u64::from_le_bytes(reader.bytes(0, 8)?.try_into().unwrap_or_default());
        reader.data_start = header_length.saturating_add(8);
        if reader.data_start > length {
            return Err(corrupt(
                path,
                format!("the header claims {header_length} bytes of a file of {length}"),
            ));
        }
        let header = reader.bytes(8, header_length as usize)?;
        reader.metadata = serde_json::from_slice(&header)
            .map_err(|error| corrupt(path, format!("damaged header: {error}")))?;
        let expected = reader.data_start + reader.metadata.data_len() as u64;
        if expected != length {
            return Err(corrupt(
                path,
                format!("{length} bytes, but its header describes {expected}"),
            ));
        }
        Ok(reader)
    }

    fn problems(&self, targets: &[(String, Tensor)]) -> Result<Vec<TensorProblem>> {
        let mut problems = Vec::new();
        let mut expected_names = HashSet::new();
        for (name, target) in targets {
            if !expected_names.insert(name.as_str()) {
                return Err(Error::DuplicateName { name: name.clone() });
            }
            let Some(info) = self.metadata.info(name) else {
                problems.push(TensorProblem::Missing { name: name.clone() });
                continue;
            };
            let (found, expected) = (shape_of(info), target.size());
            if found != expected {
                problems.push(TensorProblem::Shape {
                    name: name.clone(),
                    found,
                    expected,
                });
            }
            let (found, expected) = (self.kind_of(name, info)?, target.kind());
            if found != expected {
                problems.push(TensorProblem::Kind {
                    name: name.clone(),
                    found,
                    expected,
                });
            }
        }
        let mut stored = self.metadata.offset_keys();
        stored.sort();
        problems.extend(
            stored
                .into_iter()
                .filter(|name| !expected_names.contains(name.as_str()))
                .map(|name| TensorProblem::Unexpected { name }),
        );
        Ok(problems)
    }

    fn read(&mut self, name: &str) -> Result<Tensor> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| corrupt(self.path, format!("no tensor {name:?}")))?;
        let (shape, kind) = (shape_of(info), self.kind_of(name, info)?);
        let (start, end) = info.data_offsets;
        let bytes = self.bytes(self.data_start + start as u64, end - start)?;
        Ok(Tensor::f_from_data_size(&bytes, &shape, kind)?)
    }

    fn bytes(&mut self, start: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(CoreError::io("reading", self.path))?;
        Ok(bytes)
    }

    fn kind_of(&self, name: &str, info: &TensorInfo) -> Result<Kind> {
        kind_of(info.dtype).ok_or_else(|| {
            let reason = format!("tensor {name:?} is {}, which tch does not have", info.dtype);
            corrupt(self.path, reason)
        })
    }
}

fn shape_of(info: &TensorInfo) -> Vec<i64> {
    info.shape.iter().map(|&size| size as i64).collect()
}

fn corrupt(path: &Path, reason: String) -> Error {
    CoreError::Corrupt {
        path: path.to_path_buf(),
        reason,
    }
    .into()
}

const KINDS: [(Kind, Dtype); 15] = [
    (Kind::Bool, Dtype::BOOL),
    (Kind::Uint8, Dtype::U8),
    (Kind::Int8, Dtype::I8),
    (Kind::Int16, Dtype::I16),
    (Kind::Int, Dtype::I32),
    (Kind::Int64, Dtype::I64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::ComplexFloat, Dtype::C64),
    (Kind::Float8e5m2, Dtype::F8_E5M2),
    (Kind::Float8e4m3fn, Dtype::F8_E4M3),
    (Kind::Float8e5m2fnuz, Dtype::F8_E5M2FNUZ),
    (Kind::Float8e4m3fnuz, Dtype::F8_E4M3FNUZ),
];

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS
        .iter()
        .find_map(|&(k, dtype)| (k == kind).then_some(dtype))
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS
        .iter()
        .find_map(|&(kind, d)| (d == dtype).then_some(kind))
}
