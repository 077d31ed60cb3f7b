//! Writes a package: hidden folder, files, digests, rename. Must not know where the model came from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use sha2::{Digest, Sha256};

use super::plan::{WeightPlan, copy_tensor};
use super::{ImportError, ImportRequest, Progress, Source, check_cancelled, io, source_name};
use crate::digest;
use crate::manifest::{MANIFEST_FILE, Manifest};
use crate::package::{ARCHITECTURE_FILE, CHAT_FILE, CONFIG_FILE, Package, TOKENIZER_FILE};
use crate::tensor_file::write_header;
use crate::timestamp;

/// The one weight file an importer writes.
const WEIGHTS_FILE: &str = "weights.safetensors";
/// Left free on the disk beside the package.
const SPARE_BYTES: u64 = 16 << 20;

/// Writes the package of `source` with the guests `[architecture, chat]`, and opens it.
pub(super) fn write_package(
    request: &ImportRequest<'_>,
    source: Source,
    guests: [&[u8]; 2],
    progress: &dyn Progress,
    cancelled: &AtomicBool,
) -> Result<Package, ImportError> {
    let models = request.models_dir;
    std::fs::create_dir_all(models).map_err(io("create", models))?;
    let small = [
        (CONFIG_FILE, source.config_json.as_slice()),
        (TOKENIZER_FILE, source.tokenizer_json.as_slice()),
        (ARCHITECTURE_FILE, guests[0]),
        (CHAT_FILE, guests[1]),
    ];
    let small_bytes: u64 = small.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let needed = source
        .plan
        .size_bytes()
        .saturating_add(small_bytes)
        .saturating_add(SPARE_BYTES);
    let free = fs4::available_space(models).map_err(io("measure free space of", models))?;
    check_space(models, needed, free)?;
    // Removed when dropped, which is what every early return below does.
    let folder = tempfile::Builder::new()
        .prefix(&format!(".import-{}-", request.name))
        .tempdir_in(models)
        .map_err(io("create a folder in", models))?;
    let mut digests = BTreeMap::new();
    for (name, bytes) in small {
        write_file(&folder.path().join(name), bytes)?;
        digests.insert(name.to_owned(), digest::of_bytes(bytes));
    }
    let weights = write_weights(
        &folder.path().join(WEIGHTS_FILE),
        &source.plan,
        progress,
        cancelled,
    )?;
    digests.insert(WEIGHTS_FILE.to_owned(), weights);
    progress.stage("finish", 0);
    let manifest = Manifest {
        name: request.name.to_owned(),
        version: request.version.unwrap_or("0.1.0").to_owned(),
        license: request.license.map(str::to_owned).or(source.license),
        model_type: source.model_type,
        created: timestamp::rfc3339(request.now),
        source: source_name(request.source),
        context_tokens_max: source.context_tokens_max,
        weights: vec![WEIGHTS_FILE.to_owned()],
        chat: source.chat,
        digests,
    };
    let manifest = toml::to_string(&manifest).map_err(|error| ImportError::Field {
        file: MANIFEST_FILE.to_owned(),
        field: "manifest".to_owned(),
        expected: "TOML".to_owned(),
        got: error.to_string(),
    })?;
    write_file(&folder.path().join(MANIFEST_FILE), manifest.as_bytes())?;
    // Whatever would make the package unusable is found while the old one is still there.
    let written = Package::open(folder.path())?;
    let tokenizer = written.tokenizer()?;
    written.eos_tokens(&tokenizer)?;
    written.prompt_prefix(&tokenizer)?;
    written.weights()?;
    check_cancelled(cancelled)?;
    publish(request, folder)
}

/// Whether `needed` bytes fit.
fn check_space(dir: &Path, needed: u64, free: u64) -> Result<(), ImportError> {
    if needed <= free {
        return Ok(());
    }
    Err(ImportError::Space {
        dir: dir.display().to_string(),
        needed,
        free,
    })
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), ImportError> {
    let mut file = File::create_new(path).map_err(io("create", path))?;
    file.write_all(bytes).map_err(io("write", path))?;
    file.sync_all().map_err(io("write", path))
}

/// Copies the weights piece by piece and returns the file's digest.
fn write_weights(
    path: &Path,
    plan: &WeightPlan,
    progress: &dyn Progress,
    cancelled: &AtomicBool,
) -> Result<String, ImportError> {
    progress.stage("weights", plan.size_bytes());
    let fault = |source| ImportError::TensorFile {
        path: path.display().to_string(),
        source,
    };
    let (header, names) = write_header(&plan.infos()).map_err(fault)?;
    let sources = plan.open()?;
    let mut writer = BufWriter::new(File::create_new(path).map_err(io("create", path))?);
    let mut hasher = Sha256::new_with_prefix(&header);
    writer.write_all(&header).map_err(io("write", path))?;
    for name in names {
        let tensor = &plan.tensors[&name];
        copy_tensor(
            &name,
            tensor,
            &sources[tensor.file],
            &plan.files[tensor.file],
            |piece| {
                check_cancelled(cancelled)?;
                hasher.update(piece);
                writer.write_all(piece).map_err(io("write", path))?;
                progress.advance(piece.len() as u64);
                Ok(())
            },
        )?;
    }
    let file = writer
        .into_inner()
        .map_err(|error| io("write", path)(error.into_error()))?;
    file.sync_all().map_err(io("write", path))?;
    Ok(digest::text(hasher))
}

/// Gives the finished folder its name, putting away the package that had it.
fn publish(request: &ImportRequest<'_>, folder: tempfile::TempDir) -> Result<Package, ImportError> {
    let models = request.models_dir;
    let target = models.join(request.name);
    let old = if target.exists() {
        if !request.replace {
            return Err(ImportError::Exists(request.name.to_owned()));
        }
        let old = tempfile::Builder::new()
            .prefix(&format!(".replaced-{}-", request.name))
            .tempdir_in(models)
            .map_err(io("create a folder in", models))?;
        std::fs::rename(&target, old.path().join("package")).map_err(io("rename", &target))?;
        Some(old)
    } else {
        None
    };
    if let Err(error) = std::fs::rename(folder.path(), &target) {
        if let Some(old) = &old {
            let back = std::fs::rename(old.path().join("package"), &target);
            back.map_err(io("restore", &target))?;
        }
        return Err(io("rename", &target)(error));
    }
    // Under its new name the folder is no longer temporary.
    let _ = folder.keep();
    File::open(models)
        .and_then(|dir| dir.sync_all())
        .map_err(io("write", models))?;
    Ok(Package::open(&target)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::check_space;

    #[test]
    fn a_full_disk_says_what_is_needed_and_free() {
        assert!(check_space(Path::new("/data"), 10, 10).is_ok());
        let error = check_space(Path::new("/data"), 11, 10)
            .expect_err("full")
            .to_string();
        assert!(error.contains("needs 11 bytes, 10 are free"), "{error}");
    }
}
