//! The files that make up a tokenizer, each bounded in size.

use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

pub(super) const TOKENIZER: &str = "tokenizer.json";
/// Where transformers keeps named chat templates.
pub(super) const TEMPLATE_FOLDER: &str = "additional_chat_templates";
pub(super) const TEMPLATE: &str = "chat_template.jinja";

/// Files that belong to a tokenizer; the first must be there.
const FILES: &[&str] = &[
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "generation_config.json",
];

/// The largest tokenizers in use (vocabularies of 262,144) have 33 MB.
const SIZE_LIMIT: u64 = 64 << 20;
/// Named templates of a folder: more are not read.
const TEMPLATES_LIMIT: usize = 64;

/// Every file that is there, by its path within the folder.
pub(super) fn read(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for (i, &name) in FILES.iter().enumerate() {
        let path = dir.join(name);
        if i == 0 || path.exists() {
            files.push((name.to_string(), read_bounded(&path)?));
        }
    }
    let folder = dir.join(TEMPLATE_FOLDER);
    if folder.is_dir() {
        let entries = std::fs::read_dir(&folder).map_err(Error::io("listing", &folder))?;
        let mut names = Vec::new();
        for entry in entries.take(TEMPLATES_LIMIT) {
            let entry = entry.map_err(Error::io("listing", &folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".jinja") {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let bytes = read_bounded(&folder.join(&name))?;
            files.push((format!("{TEMPLATE_FOLDER}/{name}"), bytes));
        }
    }
    Ok(files)
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).map_err(Error::io("reading", path))?;
    let mut bytes = Vec::new();
    // Not the size that the file system reports: a device or a pipe has none.
    file.take(SIZE_LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("reading", path))?;
    match bytes.len() as u64 > SIZE_LIMIT {
        true => Err(Error::FileTooLarge {
            path: path.into(),
            limit: SIZE_LIMIT,
        }),
        false => Ok(bytes),
    }
}
