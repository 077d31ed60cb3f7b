//! One package's folder, opened for use. Reads and checks; never writes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use galerne_core::ids::TokenId;
use galerne_core::limits::GuestLimits;
use galerne_core::name::{NAME_FORM, is_name};

pub use crate::manifest::{ChatManifest, Manifest};
pub use crate::weights::PackageWeights;

use crate::digest;
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE};
use crate::tensor_file::TensorFileError;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// The model's configuration, Hugging Face style.
pub const CONFIG_FILE: &str = "config.json";
/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The architecture guest.
pub const ARCHITECTURE_FILE: &str = "architecture.wasm";
/// The chat format guest.
pub const CHAT_FILE: &str = "chat.wasm";
/// Longest configuration accepted.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Longest tokenizer accepted.
pub const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Most weight files.
const WEIGHT_FILES_MAX: usize = 4_096;

/// Why a package cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A file operation failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is longer than accepted.
    #[error("read {path}: {bytes} bytes, the limit is {limit}")]
    TooLong {
        /// The file.
        path: String,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The manifest is not TOML of the expected form.
    #[error("manifest {path}: {source}")]
    Manifest {
        /// The file.
        path: String,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A field of the manifest does not hold.
    #[error("manifest {path}: {field}: expected {expected}, got {got:?}")]
    Field {
        /// The file.
        path: String,
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// A file is not listed in the manifest, or not what the manifest says.
    #[error("package file {path}: expected digest {expected}, got {got}; import the model again")]
    Digest {
        /// The file.
        path: String,
        /// From the manifest.
        expected: String,
        /// Of the file.
        got: String,
    },
    /// The configuration is not UTF-8.
    #[error("read {path}: not UTF-8")]
    NotText {
        /// The file.
        path: String,
    },
    /// The tokenizer is unusable.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The manifest names a token the tokenizer does not have.
    #[error("manifest field {field}: the tokenizer has no token {token:?}")]
    UnknownToken {
        /// The field.
        field: &'static str,
        /// The token's name.
        token: String,
    },
    /// A weight file is unusable.
    #[error("weights {file}: {source}")]
    Weights {
        /// The file.
        file: String,
        /// What is wrong with it.
        source: TensorFileError,
    },
    /// Two weight files hold the same tensor.
    #[error("weights {file}: tensor {tensor:?} is also in another file of the package")]
    DuplicateTensor {
        /// The second file.
        file: String,
        /// The tensor's name.
        tensor: String,
    },
}

/// An opened package.
#[derive(Debug, Clone)]
pub struct Package {
    dir: PathBuf,
    manifest: Manifest,
    config_json: String,
}

impl Package {
    /// Opens the package in `dir`: reads its manifest and configuration and checks that its files exist. Every file
    /// but the weights is checked against its digest when it is read; for the weights there is [`Self::verify`].
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn open(dir: &Path) -> Result<Self, PackageError> {
        let path = dir.join(MANIFEST_FILE);
        let shown = path.display().to_string();
        let text = into_text(&path, read_bounded(&path, MANIFEST_BYTES_MAX)?)?;
        let manifest: Manifest = toml::from_str(&text).map_err(|source| PackageError::Manifest {
            path: shown.clone(),
            source: Box::new(source),
        })?;
        check_manifest(&manifest, &shown)?;
        let mut package = Self {
            dir: dir.to_owned(),
            manifest,
            config_json: String::new(),
        };
        package.config_json = into_text(
            &dir.join(CONFIG_FILE),
            package.read(CONFIG_FILE, CONFIG_BYTES_MAX)?,
        )?;
        for name in [TOKENIZER_FILE, ARCHITECTURE_FILE, CHAT_FILE]
            .into_iter()
            .chain(package.weight_files())
        {
            open_file(&dir.join(name))?;
        }
        Ok(package)
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model's configuration, Hugging Face style.
    #[must_use]
    pub fn config_json(&self) -> &str {
        &self.config_json
    }

    /// The package's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizer, parsed anew by each call.
    ///
    /// # Errors
    /// If the file is not what the manifest says, or not a tokenizer.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>, PackageError> {
        Ok(Arc::new(Tokenizer::from_bytes(
            &self.read(TOKENIZER_FILE, TOKENIZER_BYTES_MAX)?,
        )?))
    }

    /// The tokens that end an answer.
    ///
    /// # Errors
    /// If the manifest names a token `tokenizer` does not have.
    pub fn eos_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, PackageError> {
        let find = |token: &String| token_of(tokenizer, "chat.eos_tokens", token);
        self.manifest.chat.eos_tokens.iter().map(find).collect()
    }

    /// The token a plain prompt begins with, if the model wants one.
    ///
    /// # Errors
    /// If the manifest names a token `tokenizer` does not have.
    pub fn prompt_prefix(&self, tokenizer: &Tokenizer) -> Result<Option<TokenId>, PackageError> {
        match &self.manifest.chat.bos_token {
            Some(token) if self.manifest.chat.add_bos => {
                token_of(tokenizer, "chat.bos_token", token).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The architecture guest: a component.
    ///
    /// # Errors
    /// If the file is not what the manifest says.
    pub fn architecture(&self) -> Result<Vec<u8>, PackageError> {
        self.read(
            ARCHITECTURE_FILE,
            GuestLimits::default().component_bytes_max as u64,
        )
    }

    /// The chat format guest: a component.
    ///
    /// # Errors
    /// If the file is not what the manifest says.
    pub fn chat(&self) -> Result<Vec<u8>, PackageError> {
        self.read(CHAT_FILE, GuestLimits::default().component_bytes_max as u64)
    }

    /// The weights, to be read one by one, their headers checked.
    ///
    /// # Errors
    /// Names the file, and the tensor at fault.
    pub fn weights(&self) -> Result<PackageWeights, PackageError> {
        let paths: Vec<PathBuf> = self.weight_files().map(|name| self.dir.join(name)).collect();
        PackageWeights::open(&paths)
    }

    /// Bytes of all files of the package.
    ///
    /// # Errors
    /// If a file's size cannot be read.
    pub fn size_bytes(&self) -> Result<u64, PackageError> {
        let mut total = 0;
        for name in self
            .manifest
            .digests
            .keys()
            .map(String::as_str)
            .chain([MANIFEST_FILE])
        {
            let path = self.dir.join(name);
            total += std::fs::metadata(&path)
                .map_err(|source| io("read", &path, source))?
                .len();
        }
        Ok(total)
    }

    /// Reads every file and compares its digest with the manifest's. `seen` is told of bytes as they are read.
    ///
    /// # Errors
    /// Names the first file that differs.
    pub fn verify(&self, mut seen: impl FnMut(u64)) -> Result<(), PackageError> {
        for name in self.manifest.digests.keys() {
            let path = self.dir.join(name);
            let (file, _) = open_file(&path)?;
            let got = digest::of_reader(file, &mut seen).map_err(|source| io("read", &path, source))?;
            self.compare(name, got)?;
        }
        Ok(())
    }

    fn weight_files(&self) -> impl Iterator<Item = &str> {
        self.manifest.weights.iter().map(String::as_str)
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
        let bytes = read_bounded(&self.dir.join(name), limit)?;
        self.compare(name, digest::of_bytes(&bytes))?;
        Ok(bytes)
    }

    fn compare(&self, name: &str, got: String) -> Result<(), PackageError> {
        let expected = self
            .manifest
            .digests
            .get(name)
            .map_or("in the manifest", String::as_str);
        if expected == got {
            return Ok(());
        }
        let path = self.dir.join(name).display().to_string();
        Err(PackageError::Digest {
            path,
            expected: expected.to_owned(),
            got,
        })
    }
}

fn token_of(tokenizer: &Tokenizer, field: &'static str, token: &str) -> Result<TokenId, PackageError> {
    let found = tokenizer.special_id(token).or_else(|| tokenizer.token_id(token));
    found.ok_or_else(|| PackageError::UnknownToken {
        field,
        token: token.to_owned(),
    })
}

fn check_manifest(manifest: &Manifest, path: &str) -> Result<(), PackageError> {
    let fault = |field, expected, got: &str| {
        Err(PackageError::Field {
            path: path.to_owned(),
            field,
            expected,
            got: got.to_owned(),
        })
    };
    if !is_name(&manifest.name) {
        return fault("name", NAME_FORM, &manifest.name);
    }
    if manifest.weights.is_empty() || manifest.weights.len() > WEIGHT_FILES_MAX {
        return fault("weights", "1 to 4096 files", &manifest.weights.len().to_string());
    }
    if manifest.context_tokens_max == 0 {
        return fault("context_tokens_max", "at least 1", "0");
    }
    // Plain names only: a manifest must not reach out of its folder.
    let is_plain = |name: &&String| is_name(name);
    match manifest
        .weights
        .iter()
        .chain(manifest.digests.keys())
        .find(|name| !is_plain(name))
    {
        Some(name) => fault("weights, digests", "plain lower-case file names", name),
        None => Ok(()),
    }
}

fn io(operation: &'static str, path: &Path, source: std::io::Error) -> PackageError {
    PackageError::Io {
        operation,
        path: path.display().to_string(),
        source,
    }
}

/// Opens a regular file and tells its length.
pub(crate) fn open_file(path: &Path) -> Result<(File, u64), PackageError> {
    let file = File::open(path).map_err(|source| io("open", path, source))?;
    let metadata = file.metadata().map_err(|source| io("read", path, source))?;
    if !metadata.is_file() {
        return Err(io("open", path, std::io::Error::other("not a regular file")));
    }
    Ok((file, metadata.len()))
}

/// The content of a file that is not longer than `limit`.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, PackageError> {
    let (file, bytes) = open_file(path)?;
    if bytes > limit {
        return Err(PackageError::TooLong {
            path: path.display().to_string(),
            bytes,
            limit,
        });
    }
    let mut content = Vec::new();
    file.take(limit)
        .read_to_end(&mut content)
        .map_err(|source| io("read", path, source))?;
    Ok(content)
}

pub(crate) fn into_text(path: &Path, bytes: Vec<u8>) -> Result<String, PackageError> {
    String::from_utf8(bytes).map_err(|_| PackageError::NotText {
        path: path.display().to_string(),
    })
}
