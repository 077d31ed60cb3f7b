//! `galerne secret`: a tenant's secrets in the data folder. Never shows a value.

use std::fs::OpenOptions;
use std::io::{ErrorKind, IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use galerne_core::capability::SecretName;
use galerne_core::limits::CapabilityLimits;
use galerne_core::name::{NAME_FORM, is_name};

use crate::capabilities::secrets_folder;
use crate::config::DataArgs;

/// Subcommands of `galerne secret`.
#[derive(Debug, Subcommand)]
pub(super) enum SecretCommand {
    /// Set a secret to what stands on the standard input, without its last line break
    Set(SecretArgs),
    /// List the names
    List {
        /// Whose
        #[arg(long, value_name = "NAME", default_value = "default")]
        tenant: String,
    },
    /// Remove a secret
    Remove(SecretArgs),
}

/// Which secret.
#[derive(Debug, Args)]
pub(super) struct SecretArgs {
    /// Its name, as in `secrets` of a deployment's table [capabilities]
    name: String,
    /// Whose
    #[arg(long, value_name = "NAME", default_value = "default")]
    tenant: String,
}

pub(super) fn run(data: &DataArgs, command: SecretCommand) -> Result<()> {
    let folder = data.folder()?;
    match command {
        SecretCommand::Set(args) => set(&file(&folder, &args)?),
        SecretCommand::List { tenant } => list(&tenant_folder(&folder, &tenant)?),
        SecretCommand::Remove(args) => {
            let file = file(&folder, &args)?;
            std::fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
        }
    }
}

fn tenant_folder(data: &Path, tenant: &str) -> Result<PathBuf> {
    ensure!(is_name(tenant), "--tenant: expected {NAME_FORM}, got {tenant:?}");
    Ok(secrets_folder(data, tenant))
}

fn file(data: &Path, args: &SecretArgs) -> Result<PathBuf> {
    let name = SecretName::new(&args.name)?;
    Ok(tenant_folder(data, &args.tenant)?.join(name.as_str()))
}

fn set(file: &Path) -> Result<()> {
    let bytes_max = CapabilityLimits::default().secret_bytes_max;
    if std::io::stdin().is_terminal() {
        eprintln!("type the secret, then Enter and Ctrl-D");
    }
    let mut value = String::new();
    let read = std::io::stdin()
        .take(bytes_max as u64 + 2)
        .read_to_string(&mut value);
    read.context("read the secret from the standard input: expected text")?;
    if value.ends_with('\n') {
        value.pop();
    }
    ensure!(
        !value.is_empty(),
        "the standard input is empty; expected the secret"
    );
    ensure!(
        value.len() <= bytes_max,
        "the secret is longer than {bytes_max} bytes, the most a guest can read"
    );
    let folder = file.parent().context("a secret lies in a folder")?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("make {}", folder.display()))?;
    // Written beside its place and renamed: a guest reads the old value or the new one.
    let side = file.with_extension("new");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&side)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .and_then(|()| std::fs::rename(&side, file));
    written.with_context(|| format!("write {}", file.display()))
}

fn list(folder: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("read {}: {error}", folder.display()),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(
            entry?
                .file_name()
                .into_string()
                .ok()
                .filter(|name| SecretName::new(name).is_ok()),
        );
    }
    names.sort_unstable();
    for name in names {
        println!("{name}");
    }
    Ok(())
}
