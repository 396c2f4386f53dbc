//! Weights on disk: safetensors files in the layout of the Hugging Face hub.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use memmap2::{MmapMut, MmapOptions};
use rlhf_scale::tensor_from_owner;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use tch::{Kind, Tensor};

use crate::config::Fields;
use crate::placement::Placement;
use crate::weights::WeightMap;
use crate::{Error, Result, WeightProblem};

mod save;

pub use save::SaveOptions;
pub(crate) use save::write_model;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Most bytes of a file's header: names, shapes and places of some 200,000 tensors.
const MAX_HEADER: u64 = 32 << 20;
/// Bytes that libtorch's CPU allocator aligns to.
const ALIGNMENT: i64 = 64;
/// Bytes of a tensor that has a map of its own, which goes when the model has taken its copy: so the
/// file is never in memory as a whole beside the weights.
const LARGE: i64 = 1 << 20;

/// What becomes of a tensor that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// It is computed with: a view of the file, or a copy where it is not aligned.
    Whole,
    /// A part of it will be copied, and the file's other pages are not touched: a view, if need be one
    /// that is not aligned.
    Parts,
}

impl Reading {
    pub(crate) fn of(placement: &Placement) -> Self {
        match placement.is_split() {
            true => Self::Parts,
            false => Self::Whole,
        }
    }
}

/// Reads every tensor of a model folder, from one file or from the shards of an index.
pub(crate) fn read_weights(dir: &Path, reading: Reading) -> Result<WeightMap> {
    let index = dir.join(INDEX);
    let files: Vec<PathBuf> = if !dir.join(WEIGHTS).exists() && index.exists() {
        shards(&Fields::read(&index)?)?
            .into_iter()
            .map(|name| dir.join(name))
            .collect()
    } else {
        vec![dir.join(WEIGHTS)]
    };
    // A download that stopped half-way lacks several.
    let missing: Vec<PathBuf> = files
        .iter()
        .filter(|file| !file.exists())
        .cloned()
        .collect();
    if missing.len() > 1 {
        return Err(Error::MissingShards { index, missing });
    }
    let (mut weights, mut problems) = (WeightMap::new(), Vec::new());
    for file in files {
        read_file(&file, reading, &mut weights, &mut problems)?;
    }
    if problems.is_empty() {
        return Ok(weights);
    }
    let path = dir.into();
    Err(Error::Weights { path, problems })
}

/// Names of an index's files, which lie beside it.
pub(crate) fn shards(index: &Fields) -> Result<BTreeSet<String>> {
    let map: BTreeMap<String, String> = index.need("weight_map")?;
    let names: BTreeSet<String> = map.into_values().collect();
    for name in &names {
        let mut parts = Path::new(name).components();
        let plain = matches!(parts.next(), Some(Component::Normal(part)) if part == name.as_str());
        if !plain || name.contains(['/', '\\', '\0']) {
            return Err(Error::ShardName {
                path: index.path.clone(),
                name: name.clone(),
            });
        }
    }
    Ok(names)
}

fn read_file(
    path: &Path,
    reading: Reading,
    weights: &mut WeightMap,
    problems: &mut Vec<WeightProblem>,
) -> Result<()> {
    let file = File::open(path).map_err(Error::io("opening", path))?;
    let map = mapped(&file, path, None)?;
    let parsed = parse(&map).map_err(|source| Error::Safetensors {
        path: path.into(),
        source,
    })?;
    let start = map.as_ptr() as usize;
    let mut places = Vec::new();
    for (name, view) in parsed.iter().filter(|(name, _)| !is_buffer(name)) {
        match kind_of(view.dtype()) {
            Some(kind) => places.push(Place {
                name: name.into(),
                kind,
                shape: view.shape().iter().map(|&n| n as i64).collect(),
                offset: (view.data().as_ptr() as usize - start) as i64,
                bytes: view.data().len() as i64,
            }),
            None => problems.push(WeightProblem::Dtype {
                name: name.into(),
                dtype: format!("{:?}", view.dtype()),
            }),
        }
    }
    let length = map.len() as i64;
    let whole = tensor_from_owner(map, |map| &mut map[..], &[length], Kind::Uint8)
        .map_err(rlhf_core::Error::model)?;
    for place in places {
        let tensor = match place.bytes >= LARGE {
            true => {
                let map = mapped(&file, path, Some(&place))?;
                let part = tensor_from_owner(map, |map| &mut map[..], &[place.bytes], Kind::Uint8)
                    .map_err(rlhf_core::Error::model)?;
                place.tensor(part, Reading::Parts)?
            }
            false => place.tensor(whole.f_narrow(0, place.offset, place.bytes)?, reading)?,
        };
        if weights.insert(place.name.clone(), tensor).is_some() {
            problems.push(WeightProblem::Duplicate { name: place.name });
        }
    }
    Ok(())
}

/// Where a tensor lies in its file.
struct Place {
    name: String,
    kind: Kind,
    shape: Vec<i64>,
    offset: i64,
    bytes: i64,
}

impl Place {
    /// A view of the file's bytes, or a copy where they are not aligned as libtorch aligns its
    /// own memory: kernels sum in another order there, and a model loaded from its own copy
    /// would differ from it in the last bit.
    fn tensor(&self, mut bytes: Tensor, reading: Reading) -> Result<Tensor> {
        let needed = match reading {
            Reading::Whole => ALIGNMENT,
            // What views of another kind need.
            Reading::Parts => self.kind.elt_size_in_bytes() as i64,
        };
        if self.offset % needed != 0 {
            let mut copy = bytes.f_empty_like()?;
            copy.f_copy_(&bytes)?;
            bytes = copy;
        }
        // `data` gives the weight a version counter of its own: writing to one must not
        // invalidate what autograd has saved of another.
        Ok(bytes
            .f_view_dtype(self.kind)?
            .f_view(self.shape.as_slice())?
            .f_data()?)
    }
}

/// A map of a file, or of what a tensor has of it.
fn mapped(file: &File, path: &Path, part: Option<&Place>) -> Result<MmapMut> {
    let mut options = MmapOptions::new();
    if let Some(place) = part {
        options
            .offset(place.offset as u64)
            .len(place.bytes as usize);
    }
    // SAFETY: the map is private, so writes to the weights never reach the file. Whoever
    // truncates the file meanwhile gets this process a SIGBUS, as with every loader that maps;
    // this crate replaces files by renaming, which leaves the old contents to the map.
    #[allow(unsafe_code)]
    unsafe { options.map_copy(file) }.map_err(Error::io("mapping", path))
}

/// Constants that old checkpoints carry along: causal masks and rotary frequencies.
fn is_buffer(name: &str) -> bool {
    [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
        "rotary_emb.inv_freq",
    ]
    .iter()
    .any(|suffix| name.ends_with(suffix))
}

/// Writes a file under another name, then renames it.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = path.with_file_name(format!(".{name}.partial"));
    std::fs::write(&staged, bytes).map_err(Error::io("writing", &staged))?;
    std::fs::rename(&staged, path).map_err(Error::io("renaming", &staged))
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// The header of a file's bytes, checked against their number: tensors follow each other
/// without gaps or overlaps, and none reaches beyond the end.
pub(crate) fn parse(bytes: &[u8]) -> Result<SafeTensors<'_>, safetensors::SafeTensorError> {
    // The format's own bound is so large that an index of empty tensors takes gigabytes.
    let length = bytes
        .first_chunk()
        .map(|length| u64::from_le_bytes(*length));
    if length.is_some_and(|length| length > MAX_HEADER) {
        return Err(safetensors::SafeTensorError::HeaderTooLarge);
    }
    SafeTensors::deserialize(bytes)
}
