//! Log-probabilities of a reference, on disk.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rlhf_core::{Error as CoreError, Policy, Preference};
use serde::{Deserialize, Serialize};

use crate::reference::score_each;
use crate::{Error, Fingerprint, Result, ScoreOptions, ScoredPreference};

/// First line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    model: Fingerprint,
    data: Fingerprint,
    pairs: usize,
    ld_alpha: Option<f64>,
}

const FORMAT: &str = "rlhf-dpo reference log-probabilities";
const VERSION: u32 = 1;
/// Two numbers and a check sum.
const RECORD: usize = 12;

/// A file of a reference's log-probabilities, commonly beside the dataset that they are of.
///
/// The file is written as the pairs are scored. A process that dies leaves a beginning, which the
/// next one completes; what was being written when it died is recognised by check sums and scored
/// again. A file of another model, dataset or option is refused.
///
/// ```
/// # use rlhf_dpo::core::{PaddedBatch, Parameters, Policy, Preference};
/// # use rlhf_dpo::tch::{Device, Kind, Tensor};
/// use rlhf_dpo::{Fingerprint, ReferenceCache, ScoreOptions};
/// # struct Uniform(Tensor);
/// # impl Parameters for Uniform {
/// #     fn named_parameters(&self) -> Vec<(String, Tensor)> { vec![("t".into(), self.0.shallow_clone())] }
/// # }
/// # impl Policy for Uniform {
/// #     fn logits(&self, batch: &PaddedBatch) -> rlhf_dpo::core::Result<Tensor> {
/// #         let size = batch.input_ids.size();
/// #         Ok(Tensor::zeros([size[0], size[1], 8], (Kind::Float, Device::Cpu)))
/// #     }
/// # }
/// # let reference = Uniform(Tensor::zeros([1], (Kind::Float, Device::Cpu)));
/// # let dir = tempfile::tempdir().unwrap();
/// # let file = dir.path().join("pairs.ref");
/// # let pairs = vec![Preference::new([1], [2], [3, 4])];
///
/// let cache = ReferenceCache::new(&file, Fingerprint::of_weights(&reference)?);
/// let options = ScoreOptions::default();
/// let scored = cache.complete(&reference, &pairs, &options)?; // once
/// let again = cache.read(&pairs, &options)?; // without the model
/// assert_eq!(scored, again);
/// // DpoTrainer::new(policy, Reference::Scored, config)?.train_scored(&again, ..)
/// # Ok::<(), rlhf_dpo::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ReferenceCache {
    path: PathBuf,
    model: Fingerprint,
}

impl ReferenceCache {
    /// The file at `path`, of the model with this fingerprint. Nothing is read yet.
    pub fn new(path: impl Into<PathBuf>, model: Fingerprint) -> Self {
        Self {
            path: path.into(),
            model,
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what is there and scores what is missing.
    ///
    /// # Errors
    /// [`Error::CacheMismatch`]; a file that is none of these; those of
    /// [`score_preferences`](crate::score_preferences).
    pub fn complete(
        &self,
        reference: &(impl Policy + ?Sized),
        pairs: &[Preference],
        options: &ScoreOptions,
    ) -> Result<Vec<ScoredPreference>> {
        if !self.path.exists() {
            self.begin(&self.header(pairs, options))?;
        }
        let mut scored = self.opened(pairs, options)?;
        if scored.pairs.len() == pairs.len() {
            return Ok(scored.pairs);
        }
        let io = |error| Error::from(CoreError::io("writing", &self.path)(error));
        let mut file = OpenOptions::new()
            .write(true)
            .open(&self.path)
            .map_err(io)?;
        file.set_len(scored.end).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let missing = &pairs[scored.pairs.len()..];
        score_each(reference, missing, options, |part| {
            let mut bytes = Vec::with_capacity(part.len() * RECORD);
            for (i, pair) in part.iter().enumerate() {
                let row = scored.pairs.len() + i;
                bytes.extend(record(row, [pair.ref_chosen, pair.ref_rejected]));
            }
            file.write_all(&bytes).map_err(io)?;
            file.sync_data().map_err(io)?;
            scored.pairs.extend(part);
            Ok(())
        })?;
        Ok(scored.pairs)
    }

    /// Reads a complete file.
    ///
    /// # Errors
    /// [`Error::CacheMismatch`]; [`Error::CacheIncomplete`]; a file that is absent, or none of
    /// these.
    pub fn read(
        &self,
        pairs: &[Preference],
        options: &ScoreOptions,
    ) -> Result<Vec<ScoredPreference>> {
        let scored = self.opened(pairs, options)?.pairs;
        match scored.len() == pairs.len() {
            true => Ok(scored),
            false => Err(Error::CacheIncomplete {
                path: self.path.clone(),
                found: scored.len(),
                expected: pairs.len(),
            }),
        }
    }

    fn header(&self, pairs: &[Preference], options: &ScoreOptions) -> Header {
        Header {
            format: FORMAT.into(),
            version: VERSION,
            model: self.model,
            data: Fingerprint::of_pairs(pairs),
            pairs: pairs.len(),
            ld_alpha: options.ld_alpha,
        }
    }

    /// Puts a file with nothing but a header in place, whole.
    fn begin(&self, header: &Header) -> Result<()> {
        let io = |error| Error::from(CoreError::io("writing", &self.path)(error));
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(name);
        let mut line = serde_json::to_vec(header).map_err(|error| io(error.into()))?;
        line.push(b'\n');
        let mut file = File::create(&temporary).map_err(io)?;
        file.write_all(&line).map_err(io)?;
        file.sync_all().map_err(io)?;
        fs::rename(&temporary, &self.path).map_err(io)
    }

    /// What the file holds of `pairs`, up to the first record that is not whole.
    fn opened(&self, pairs: &[Preference], options: &ScoreOptions) -> Result<Opened> {
        let io = |error| Error::from(CoreError::io("reading", &self.path)(error));
        let mut reader = BufReader::new(File::open(&self.path).map_err(io)?);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line).map_err(io)?;
        let found: Header = serde_json::from_slice(&line).map_err(|error| CoreError::Corrupt {
            path: self.path.clone(),
            reason: format!("no file of reference log-probabilities: {error}"),
        })?;
        self.check(&found, &self.header(pairs, options))?;
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(io)?;
        let mut scored = Vec::with_capacity(pairs.len());
        for (row, (bytes, pair)) in bytes.chunks_exact(RECORD).zip(pairs).enumerate() {
            let number = |at: usize| {
                let mut four = [0; 4];
                four.copy_from_slice(&bytes[at..at + 4]);
                f32::from_le_bytes(four)
            };
            let sides = [number(0), number(4)];
            if record(row, sides) != bytes {
                break;
            }
            scored.push(ScoredPreference {
                pair: pair.clone(),
                ref_chosen: sides[0],
                ref_rejected: sides[1],
            });
        }
        Ok(Opened {
            end: (line.len() + scored.len() * RECORD) as u64,
            pairs: scored,
        })
    }

    fn check(&self, found: &Header, expected: &Header) -> Result<()> {
        let differ = |what: &'static str, found: String, expected: String| {
            Err(Error::CacheMismatch {
                path: self.path.clone(),
                what,
                found,
                expected,
            })
        };
        let text = |h: &Header| format!("{} {}", h.format, h.version);
        if text(found) != text(expected) {
            return differ("format", text(found), text(expected));
        }
        if found.model != expected.model {
            return differ("model", found.model.to_string(), expected.model.to_string());
        }
        if (found.data, found.pairs) != (expected.data, expected.pairs) {
            let name = |h: &Header| format!("{} pairs, {}", h.pairs, h.data);
            return differ("dataset", name(found), name(expected));
        }
        if found.ld_alpha != expected.ld_alpha {
            let name = |h: &Header| format!("{:?}", h.ld_alpha);
            return differ("ld_alpha", name(found), name(expected));
        }
        Ok(())
    }
}

struct Opened {
    pairs: Vec<ScoredPreference>,
    /// Bytes of the file that are good.
    end: u64,
}

/// The numbers of row `row`, and a check sum of both that no row of zeros has.
fn record(row: usize, sides: [f32; 2]) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..4].copy_from_slice(&sides[0].to_le_bytes());
    bytes[4..8].copy_from_slice(&sides[1].to_le_bytes());
    let mut sum = 0x811c_9dc5u32; // FNV-1a
    for byte in (row as u64).to_le_bytes().iter().chain(&bytes[..8]) {
        sum = (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    }
    bytes[8..].copy_from_slice(&sum.to_le_bytes());
    bytes
}
