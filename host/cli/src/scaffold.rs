//! A new plugin's folder: a crate for one world that builds by itself, with the SDK and the contract inside.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use galerne_core::name::{NAME_FORM, is_name};

/// The files of `sdk-guest/` and `wit/`, and the first-party guests that are templates, by path from the workspace's root.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/sdk.rs"));
/// The lines of the workspace's manifest that the SDK's dependencies inherit.
const DEPENDENCIES: &str = include_str!(concat!(env!("OUT_DIR"), "/sdk-dependencies.toml"));

const MANIFEST: &str = include_str!("../templates/Cargo.toml.txt");
const WORKSPACE: &str = include_str!("../templates/workspace.toml.txt");

/// What a plugin begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Template {
    /// Changes or refuses requests and answers
    Filter,
    /// Draws the tokens
    Sampler,
    /// Functions a model may call
    Tool,
    /// Owns the loop between a request and its answer
    Pipeline,
    /// An architecture; begins as the one for Llama
    Model,
    /// A chat format; begins as the one for ChatML
    Chat,
}

impl Template {
    /// Every template.
    pub const ALL: [Self; 6] = [
        Self::Filter,
        Self::Sampler,
        Self::Tool,
        Self::Pipeline,
        Self::Model,
        Self::Chat,
    ];

    /// The SDK's feature.
    fn feature(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Sampler => "sampling",
            Self::Tool => "tool",
            Self::Pipeline => "pipeline",
            Self::Model => "model",
            Self::Chat => "chat",
        }
    }

    /// Path below `src/` and text of each source file.
    fn sources(self) -> Vec<(String, &'static [u8])> {
        let one = |text: &'static str| vec![("lib.rs".to_owned(), text.as_bytes())];
        let of_guest = |guest: &str| {
            let folder = format!("plugins/{guest}/src/");
            let below = |(path, bytes): &(&str, &'static [u8])| {
                path.strip_prefix(&folder).map(|path| (path.to_owned(), *bytes))
            };
            FILES.iter().filter_map(below).collect()
        };
        match self {
            Self::Filter => one(include_str!("../templates/filter.rs")),
            Self::Sampler => one(include_str!("../templates/sampler.rs")),
            Self::Tool => one(include_str!("../templates/tool.rs")),
            Self::Pipeline => one(include_str!("../templates/pipeline.rs")),
            Self::Model => of_guest("llama"),
            Self::Chat => of_guest("chatml"),
        }
    }

    /// Cases for `galerne plugin test`, for worlds that have them.
    fn cases(self) -> Option<&'static str> {
        match self {
            Self::Filter => Some(include_str!("../templates/filter.tests.toml")),
            Self::Sampler => Some(include_str!("../templates/sampler.tests.toml")),
            Self::Tool => Some(include_str!("../templates/tool.tests.toml")),
            Self::Pipeline => Some(include_str!("../templates/pipeline.tests.toml")),
            Self::Model | Self::Chat => None,
        }
    }

    /// A deployment that uses the plugin, for worlds that deployments name.
    fn deployment(self, name: &str) -> Option<String> {
        let head = format!("name = \"my-{name}\"\nmodel = \"smollm2\"\n\n");
        let part = match self {
            Self::Filter => format!("[[filters]]\nplugin = \"{name}\"\nparams = {{ word = \"secret\" }}\n"),
            Self::Sampler => format!("[sampler]\nplugin = \"{name}\"\nparams = {{ from = 0.2, to = 1.0 }}\n"),
            Self::Tool => format!("[[tools]]\nplugin = \"{name}\"\n"),
            Self::Pipeline => format!("[pipeline]\nplugin = \"{name}\"\nparams = {{ checks = 1 }}\n"),
            Self::Model | Self::Chat => return None,
        };
        Some(head + &part)
    }
}

/// Makes the folder `folder` with a plugin called `name` in it.
///
/// # Errors
/// A bad name, a folder that exists, or a file that cannot be written.
pub fn create(folder: &Path, name: &str, template: Template) -> Result<()> {
    ensure!(
        is_name(name) && name.starts_with(|first: char| first.is_ascii_alphabetic()) && !name.contains('.'),
        "{name:?}: expected a plugin's name, {NAME_FORM}, that begins with a letter and has no dot: it names a crate too"
    );
    if folder.exists() {
        bail!("{} exists; choose another name, or remove it", folder.display());
    }
    let manifest = MANIFEST
        .replace("{name}", name)
        .replace("{feature}", template.feature());
    write(&folder.join("Cargo.toml"), manifest.as_bytes())?;
    write(&folder.join(".gitignore"), b"/target\n")?;
    for (path, text) in template.sources() {
        write(&folder.join("src").join(path), text)?;
    }
    if let Some(cases) = template.cases() {
        write(&folder.join("tests.toml"), cases.as_bytes())?;
    }
    if let Some(deployment) = template.deployment(name) {
        write(&folder.join("deployment.toml"), deployment.as_bytes())?;
    }
    let sdk = folder.join("galerne");
    let workspace = WORKSPACE
        .replace("{version}", env!("CARGO_PKG_VERSION"))
        .replace("{rust_version}", env!("CARGO_PKG_RUST_VERSION"))
        .replace("{dependencies}", DEPENDENCIES.trim_end());
    write(&sdk.join("Cargo.toml"), workspace.as_bytes())?;
    for (path, bytes) in FILES {
        if path.starts_with("sdk-guest/") || path.starts_with("wit/") {
            write(&sdk.join(path), bytes)?;
        }
    }
    Ok(())
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let folder = file.parent().context("a file lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    std::fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_a_whole_crate() {
        let parent = tempfile::tempdir().expect("folder");
        for template in Template::ALL {
            let folder = parent.path().join(template.feature());
            create(&folder, "mine", template).expect("made");
            for file in ["src/lib.rs", "galerne/sdk-guest/src/lib.rs"] {
                let length = folder.join(file).metadata().expect(file).len();
                assert!(length > 0, "{file} is empty");
            }
            for file in ["Cargo.toml", "galerne/Cargo.toml"] {
                let text = std::fs::read_to_string(folder.join(file)).expect(file);
                assert!(
                    toml::from_str::<toml::Table>(&text).is_ok() && !text.contains("{name}"),
                    "{file}"
                );
            }
            let wit = std::fs::read_dir(folder.join("galerne/wit")).expect("the contract");
            assert!(wit.count() >= 5);
            if let Ok(text) = std::fs::read_to_string(folder.join("deployment.toml")) {
                let deployment: galerne_core::deployment::Deployment = toml::from_str(&text).expect("TOML");
                deployment.check().expect("a deployment");
            }
            assert!(create(&folder, "mine", template).is_err(), "it exists");
        }
        for name in ["../x", "9lives", "a.b", "", "Ä"] {
            assert!(
                create(&parent.path().join("bad"), name, Template::Tool).is_err(),
                "{name}"
            );
        }
    }
}
