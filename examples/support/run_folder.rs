//! What a run leaves behind.

use std::error::Error;
use std::path::{Path, PathBuf};

use rlhf::core::{JsonlObserver, Observer, ProgressObserver};
use rlhf::models::{CausalLm, Tokenizer};
use serde::Serialize;

use super::curves::{self, Panel};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The folder of a run: its policy, metrics and curves, and what it came to.
pub struct RunFolder(PathBuf);

impl RunFolder {
    pub fn create(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        Ok(Self(path.to_path_buf()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Every metric goes to `metrics.jsonl`, and these to the progress line.
    pub fn observers<'a>(
        &self,
        shown: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Box<dyn Observer>>> {
        Ok(vec![
            Box::new(JsonlObserver::create(self.metrics())?),
            Box::new(ProgressObserver::new(shown)),
        ])
    }

    /// As a Hugging Face folder, with the tokenizer where it has one.
    pub fn save_policy(&self, policy: &CausalLm, tokenizer: Option<&Tokenizer>) -> Result<()> {
        let dir = self.0.join("policy");
        policy.save_pretrained(&dir)?;
        match tokenizer {
            Some(tokenizer) => Ok(tokenizer.save(&dir)?),
            None => Ok(()),
        }
    }

    /// Draws the metrics of a phase, smoothed over `window` steps, and writes the report.
    pub fn finish(
        &self,
        (phase, panels, window): (&str, &[Panel<'_>], usize),
        report: &impl Serialize,
    ) -> Result<()> {
        let curves = self.0.join("curves.svg");
        curves::draw(&self.metrics(), phase, panels, window, &curves)?;
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(self.0.join("summary.json"), json)?;
        println!(
            "policy, curves.svg, metrics.jsonl and summary.json are in {}",
            self.0.display()
        );
        Ok(())
    }

    fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }
}
