//! Weights on disk: safetensors files in the layout of the Hugging Face hub.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use rlhf_scale::{Precision, tensor_from_owner};
use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::config::Fields;
use crate::weights::WeightMap;
use crate::{Error, Result, WeightProblem};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that libtorch's CPU allocator aligns to.
const ALIGNMENT: i64 = 64;

/// Reads every tensor of a model folder, from one file or from the shards of an index.
pub(crate) fn read_weights(dir: &Path) -> Result<WeightMap> {
    let index = dir.join(INDEX);
    let files: Vec<PathBuf> = if !dir.join(WEIGHTS).exists() && index.exists() {
        let shards: HashMap<String, String> = Fields::read(&index)?.need("weight_map")?;
        let names: BTreeSet<&String> = shards.values().collect();
        names.into_iter().map(|name| dir.join(name)).collect()
    } else {
        vec![dir.join(WEIGHTS)]
    };
    let (mut weights, mut problems) = (WeightMap::new(), Vec::new());
    for file in files {
        read_file(&file, &mut weights, &mut problems)?;
    }
    if problems.is_empty() {
        return Ok(weights);
    }
    let path = dir.into();
    Err(Error::Weights { path, problems })
}

fn read_file(
    path: &Path,
    weights: &mut WeightMap,
    problems: &mut Vec<WeightProblem>,
) -> Result<()> {
    let file = std::fs::File::open(path).map_err(Error::io("opening", path))?;
    // SAFETY: the map is private, so writes to the weights never reach the file. Whoever
    // truncates the file meanwhile gets this process a SIGBUS, as with every loader that maps;
    // this crate replaces files by renaming, which leaves the old contents to the map.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::MmapOptions::new().map_copy(&file) }
        .map_err(Error::io("mapping", path))?;
    let parsed = SafeTensors::deserialize(&map).map_err(|source| Error::Safetensors {
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
        weights.insert(place.name.clone(), place.tensor(&whole)?);
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
    fn tensor(&self, whole: &Tensor) -> Result<Tensor> {
        let mut bytes = whole.f_narrow(0, self.offset, self.bytes)?;
        if self.offset % ALIGNMENT != 0 {
            bytes = bytes.copy();
        }
        // `data` gives the weight a version counter of its own: writing to one must not
        // invalidate what autograd has saved of another.
        Ok(bytes
            .f_view_dtype(self.kind)?
            .f_view(self.shape.as_slice())?
            .f_data()?)
    }
}

/// Constants that old checkpoints carry along: causal masks and rotary frequencies.
fn is_buffer(name: &str) -> bool {
    [".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

/// Writes `model.safetensors`, the weights rounded to `kind`, and `config.json`. Each file is complete or not there; the
/// weights come first, so that a new config never describes old weights.
pub(crate) fn write_model(
    dir: &Path,
    weights: Vec<(String, Tensor)>,
    kind: Kind,
    config: &Value,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("creating", dir))?;
    let text = serde_json::to_string_pretty(config).map_err(|source| Error::Json {
        path: dir.join("config.json"),
        source,
    })?;
    let staged = dir.join(".config.json.partial");
    std::fs::write(&staged, text + "\n").map_err(Error::io("writing", &staged))?;
    let path = dir.join(WEIGHTS);
    let views = weights
        .into_iter()
        .map(|(name, tensor)| Ok((name, Stored::new(&tensor, kind)?)))
        .collect::<Result<Vec<_>>>()?;
    // transformers refuses a file without this.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize_to_file(views, Some(metadata), &path).map_err(|source| Error::Safetensors {
        path: path.clone(),
        source,
    })?;
    // The writer's temporary file is private to the user; the result should not be.
    let permissions = std::fs::metadata(&staged).map_err(Error::io("reading", &staged))?;
    std::fs::set_permissions(&path, permissions.permissions())
        .map_err(Error::io("writing", &path))?;
    std::fs::rename(&staged, dir.join("config.json")).map_err(Error::io("renaming", &staged))
}

/// Writes a file under another name, then renames it.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = path.with_file_name(format!(".{name}.partial"));
    std::fs::write(&staged, bytes).map_err(Error::io("writing", &staged))?;
    std::fs::rename(&staged, path).map_err(Error::io("renaming", &staged))
}

/// A tensor as the safetensors writer wants it. Its bytes are made when they are written, so that a
/// model saved in another kind is never there twice.
struct Stored {
    tensor: Tensor,
    kind: Kind,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl Stored {
    fn new(tensor: &Tensor, kind: Kind) -> Result<Self> {
        let mut tensor = tensor.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        if Precision::of_kind(kind).is_none() || Precision::of_kind(tensor.kind()).is_none() {
            tensor = tensor.f_to_kind(kind)?;
        }
        Ok(Self {
            shape: tensor.size().iter().map(|&n| n as usize).collect(),
            dtype: match kind {
                Kind::Double => Dtype::F64,
                Kind::Half => Dtype::F16,
                Kind::BFloat16 => Dtype::BF16,
                _ => Dtype::F32,
            },
            kind,
            tensor,
        })
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let own = self.tensor.kind();
        let mut bytes = vec![0; self.tensor.numel() * own.elt_size_in_bytes()];
        self.tensor.copy_data_u8(&mut bytes, self.tensor.numel());
        if own != self.kind
            && let (Some(from), Some(to)) = (Precision::of_kind(own), Precision::of_kind(self.kind))
        {
            bytes = to.encode(&from.decode(&bytes));
        }
        Cow::Owned(bytes)
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }
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
