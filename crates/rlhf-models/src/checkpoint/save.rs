//! Writing a model folder, in one file of weights or in several.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rlhf_scale::Precision;
use safetensors::serialize_to_file;
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{INDEX, WEIGHTS};
use crate::{Error, Result};

const CONFIG: &str = "config.json";

/// How a model is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// The weights are rounded to this kind; `None` for the one that they have.
    pub kind: Option<Kind>,
    /// Most bytes of a file of weights, unless it holds one tensor alone.
    pub max_shard_size: u64,
}

impl Default for SaveOptions {
    /// As the weights are, in files of at most 50 GB, as transformers 5.
    fn default() -> Self {
        Self {
            kind: None,
            max_shard_size: 50_000_000_000,
        }
    }
}

/// Writes weights, rounded to `kind`, and `config.json`.
///
/// All files are written beside their places first, and no file is ever half there. A crash in the
/// midst of the renames leaves a folder of shards without its index, which cannot be loaded; a
/// folder of one file may then have the new weights beside the old `config.json`.
pub(crate) fn write_model(
    dir: &Path,
    weights: Vec<(String, Tensor)>,
    kind: Kind,
    config: &Value,
    max_shard_size: u64,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("creating", dir))?;
    let mut staged = Staged::new(dir);
    staged.write_json(CONFIG, config)?;
    let shards = split(weights, kind, max_shard_size);
    if let [_] = shards.as_slice() {
        for shard in shards {
            staged.write_weights(WEIGHTS, shard, kind)?;
        }
        staged.publish(&[WEIGHTS, CONFIG])?;
        remove(&dir.join(INDEX))?;
        return remove_old_shards(dir, &[]);
    }
    let (count, mut names) = (shards.len(), Vec::new());
    let (mut map, mut bytes, mut elements) = (BTreeMap::new(), 0, 0);
    for (i, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        for (name, tensor) in &shard {
            map.insert(name.clone(), json!(file));
            bytes += bytes_of(tensor, kind);
            elements += tensor.numel();
        }
        staged.write_weights(&file, shard, kind)?;
        names.push(file);
    }
    let metadata = json!({"total_parameters": elements, "total_size": bytes});
    staged.write_json(INDEX, &json!({"metadata": metadata, "weight_map": map}))?;
    // Old shards may have the same names: without an index none of them is read.
    remove(&dir.join(INDEX))?;
    remove(&dir.join(WEIGHTS))?;
    let order = names.iter().map(String::as_str);
    let order: Vec<&str> = order.chain([CONFIG, INDEX]).collect();
    staged.publish(&order)?;
    remove_old_shards(dir, &names)
}

/// Weights in their order, as many to a shard as fit.
fn split(
    weights: Vec<(String, Tensor)>,
    kind: Kind,
    max_shard_size: u64,
) -> Vec<Vec<(String, Tensor)>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for (name, tensor) in weights {
        let bytes = bytes_of(&tensor, kind);
        if filled > 0 && filled + bytes > max_shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((name, tensor));
        }
    }
    shards
}

fn bytes_of(tensor: &Tensor, kind: Kind) -> u64 {
    (tensor.numel() * kind.elt_size_in_bytes()) as u64
}

/// Files that are complete but not in their places yet. Those that never get there are removed.
struct Staged<'a> {
    dir: &'a Path,
    files: Vec<String>,
}

impl<'a> Staged<'a> {
    fn new(dir: &'a Path) -> Self {
        let files = Vec::new();
        Self { dir, files }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.join(format!(".{name}.partial"))
    }

    fn write_json(&mut self, name: &str, value: &Value) -> Result<()> {
        let path = self.place(name);
        let text = serde_json::to_string_pretty(value).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        self.files.push(name.into());
        std::fs::write(&path, text + "\n").map_err(Error::io("writing", &path))?;
        sync(&path)
    }

    fn write_weights(
        &mut self,
        name: &str,
        weights: Vec<(String, Tensor)>,
        kind: Kind,
    ) -> Result<()> {
        let path = self.place(name);
        let views = weights
            .into_iter()
            .map(|(name, tensor)| Ok((name, Stored::new(&tensor, kind)?)))
            .collect::<Result<Vec<_>>>()?;
        self.files.push(name.into());
        // transformers refuses a file without this.
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        serialize_to_file(views, Some(metadata), &path).map_err(|source| Error::Safetensors {
            path: path.clone(),
            source,
        })?;
        // The writer's own file is private to the user; the result should not be.
        let like = self.place(CONFIG);
        let like = std::fs::metadata(&like).map_err(Error::io("reading", &like))?;
        std::fs::set_permissions(&path, like.permissions()).map_err(Error::io("writing", &path))?;
        sync(&path)
    }

    /// Puts the files into their places, in that order.
    fn publish(mut self, order: &[&str]) -> Result<()> {
        for name in order {
            let from = self.place(name);
            let to = self.dir.join(name);
            std::fs::rename(&from, to).map_err(Error::io("renaming", &from))?;
            self.files.retain(|file| file != name);
        }
        sync(self.dir)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        for file in &self.files {
            // The error that led here matters; a file that cannot be removed is only litter.
            let _ = std::fs::remove_file(self.place(file));
        }
    }
}

fn sync(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).map_err(Error::io("opening", path))?;
    file.sync_all().map_err(Error::io("syncing", path))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("removing", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes the shards of a model that was here before.
fn remove_old_shards(dir: &Path, new: &[String]) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io("reading", dir))? {
        let entry = entry.map_err(Error::io("reading", dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if is_shard(name) && !new.iter().any(|file| file == name) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn is_shard(name: &str) -> bool {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(this, of)| number(this) && number(of))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_filled_in_order() {
        let weight = |name: &str, n: i64| {
            let tensor = Tensor::zeros([n], (Kind::Float, Device::Cpu));
            (name.to_string(), tensor)
        };
        let weights = vec![
            weight("a", 2),
            weight("b", 2),
            weight("c", 9),
            weight("d", 1),
        ];
        let names: Vec<Vec<String>> = split(weights, Kind::Float, 16)
            .into_iter()
            .map(|shard| shard.into_iter().map(|(name, _)| name).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"]]);
        assert_eq!(split(Vec::new(), Kind::Float, 16).len(), 1);
    }

    #[test]
    fn names_of_shards() {
        assert!(is_shard("model-00001-of-00002.safetensors"));
        for other in [
            "model.safetensors",
            "model-1-of-2.safetensors",
            "adapter_model-00001-of-00002.safetensors",
            "model-00001-of-00002.bin",
        ] {
            assert!(!is_shard(other), "{other}");
        }
    }
}
