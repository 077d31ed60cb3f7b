//! First-party guests in the binary, and how an architecture, chat format, sampler or filter is found.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use galerne_core::graph::Op;
use galerne_core::guest::SamplerFactory;
use galerne_core::limits::GraphLimits;
use galerne_core::validate::{ValidGraph, validate};
use galerne_core::weights::WeightIndex;
use galerne_plugin::{Isolation, PluginHost, PluginOptions};
use galerne_store::import::GuestChooser;

use crate::config::DataArgs;

/// Name and component of every guest this binary carries.
pub const EMBEDDED: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/guests.rs"));

/// Whose guests those are that the operator brings as files and in models.
const OPERATOR: &str = "operator";
/// Weights named in one note.
const NAMED_MAX: usize = 8;
const ARCHITECTURES: &[&str] = &["llama"];
const CHAT_FORMATS: &[&str] = &["chatml"];
const SAMPLERS: &[&str] = &["mirostat", "watermark", "ngram-speculate"];

/// Options of a plugin host that compiles in processes of this program, keeps their work in the data folder, and runs
/// tenants' guests in cells.
///
/// # Errors
/// The data folder cannot be made.
pub fn plugin_options(data: &DataArgs) -> Result<PluginOptions> {
    Ok(PluginOptions {
        // By this name, and not by its path, it stays this program when its file is replaced.
        worker: Some(PathBuf::from("/proc/self/exe")),
        artifacts: Some(data.folder()?.join("compiled")),
        isolation: Isolation::Process,
        ..PluginOptions::default()
    })
}

/// Where a guest of this component belongs: what this binary carries runs in this process, all else is the operator's own
/// and runs where tenants' guests do.
#[must_use]
pub fn place(host: &PluginHost, component: &[u8]) -> PluginHost {
    if EMBEDDED.iter().any(|(_, known)| *known == component) {
        host.clone()
    } else {
        host.for_tenant(OPERATOR)
    }
}

/// The embedded guest called `name`.
///
/// # Errors
/// This build carries no guests.
pub fn embedded(name: &str) -> Result<&'static [u8]> {
    EMBEDDED.iter().find(|(known, _)| *known == name).map(|(_, component)| *component).with_context(|| {
        format!("this build of galerne carries no guest \"{name}\"; build it with `cargo xtask guests`, then build galerne again")
    })
}

/// All guests of this binary by name: what deployments find besides their tenants' own.
#[must_use]
pub fn by_embedded_name() -> BTreeMap<String, &'static [u8]> {
    let owned = |(name, component): &(&str, &'static [u8])| ((*name).to_owned(), *component);
    EMBEDDED.iter().map(owned).collect()
}

/// Chooses the guests of a model that is being imported: the author's own, or the first embedded one that fits.
pub struct Chooser<'a> {
    /// Runs the embedded guests to ask what they know.
    pub host: &'a PluginHost,
    /// An author's own architecture.
    pub architecture: Option<PathBuf>,
    /// An author's own chat format.
    pub chat: Option<PathBuf>,
}

impl GuestChooser for Chooser<'_> {
    fn architecture(&self, model_type: &str) -> Result<Vec<u8>, String> {
        self.find_architecture(model_type)
            .map_err(|error| crate::report(&error))
    }

    fn chat(&self, template: Option<&str>, special_tokens: &[String]) -> Result<Vec<u8>, String> {
        self.find_chat(template, special_tokens)
            .map_err(|error| crate::report(&error))
    }

    fn check(&self, architecture: &[u8], config_json: &str, weights: &WeightIndex) -> Result<(), String> {
        let fits = || -> Result<()> {
            let graph = place(self.host, architecture)
                .load_model("architecture", architecture)?
                .build(config_json)?;
            let graph = validate(graph, weights, &GraphLimits::default())?;
            for note in notes(&graph, weights) {
                eprintln!("galerne: note: {note}");
            }
            Ok(())
        };
        fits().map_err(|error| crate::report(&error))
    }
}

/// What is no error and yet seldom meant.
fn notes(graph: &ValidGraph, weights: &WeightIndex) -> Vec<String> {
    let mut notes = Vec::new();
    let read: BTreeSet<&str> = graph.graph().nodes.iter().flat_map(Op::weights).collect();
    let unread: Vec<&str> = weights
        .tensors
        .keys()
        .map(String::as_str)
        .filter(|name| !read.contains(name))
        .collect();
    if !unread.is_empty() {
        let some = unread[..unread.len().min(NAMED_MAX)].join(", ");
        let more = if unread.len() > NAMED_MAX { ", …" } else { "" };
        notes.push(format!(
            "the architecture reads all but {} of the {} weights; it leaves out {some}{more}",
            unread.len(),
            weights.tensors.len()
        ));
    }
    if graph.vocabulary().is_none() {
        let graph = graph.graph();
        notes.push(format!(
            "the graph ends in {} and gives no logits: such a model is kept but cannot be served yet; a language model ends \
             in logits, or in scale or soft-cap of logits",
            graph.nodes[graph.output.index()].name()
        ));
    }
    notes
}

impl Chooser<'_> {
    fn find_architecture(&self, model_type: &str) -> Result<Vec<u8>> {
        if let Some(file) = &self.architecture {
            let component = read(file)?;
            place(self.host, &component).load_model(&file_name(file), &component)?;
            return Ok(component);
        }
        let mut known = Vec::new();
        for name in ARCHITECTURES {
            let component = embedded(name)?;
            let types = self.host.load_model(name, component)?.model_types()?;
            if types.iter().any(|known_type| known_type == model_type) {
                return Ok(component.to_vec());
            }
            known.extend(types);
        }
        bail!(
            "no architecture guest builds model type \"{model_type}\" (known: {}); bring one with --architecture FILE.wasm",
            known.join(", ")
        )
    }

    fn find_chat(&self, template: Option<&str>, special_tokens: &[String]) -> Result<Vec<u8>> {
        if let Some(file) = &self.chat {
            let component = read(file)?;
            place(self.host, &component).load_chat(&file_name(file), &component)?;
            return Ok(component);
        }
        for name in CHAT_FORMATS {
            let component = embedded(name)?;
            if self
                .host
                .load_chat(name, component)?
                .recognises(template, special_tokens)?
            {
                return Ok(component.to_vec());
            }
        }
        bail!(
            "no chat guest recognises this model's template (known formats: {}); bring one with --chat FILE.wasm",
            CHAT_FORMATS.join(", ")
        )
    }
}

/// The samplers of this binary and the user's own given as `NAME=FILE.wasm`, which may replace them, by name.
///
/// # Errors
/// A file that cannot be read or is no sampler, or a malformed `NAME=FILE`.
pub fn samplers(host: &PluginHost, own: &[String]) -> Result<BTreeMap<String, Arc<dyn SamplerFactory>>> {
    let mut guests = BTreeMap::new();
    for name in SAMPLERS {
        // A build without guests still serves; a request that names one is told it is unknown.
        if let Ok(component) = embedded(name) {
            guests.insert((*name).to_owned(), host.load_sampler(name, component)?);
        }
    }
    for entry in own {
        let (name, file) = entry
            .split_once('=')
            .with_context(|| format!("--sampler: expected NAME=FILE.wasm, got \"{entry}\""))?;
        let component = read(Path::new(file))?;
        guests.insert(
            name.to_owned(),
            place(host, &component).load_sampler(name, &component)?,
        );
    }
    Ok(guests)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("read the guest {}", file.display()))
}

fn file_name(file: &Path) -> String {
    file.file_stem().map_or_else(
        || file.display().to_string(),
        |stem| stem.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use galerne_core::dtype::DType;
    use galerne_core::graph::{EmbeddingIndex, Graph};
    use galerne_core::ids::NodeId;
    use galerne_core::weights::WeightInfo;

    use super::*;

    #[test]
    fn what_an_architecture_forgets_is_told() {
        let table = || WeightInfo {
            dtype: DType::F32,
            shape: vec![4, 8],
        };
        let tensors = ["embed.weight", "head.bias", "layers.0.weight"].map(|name| (name.to_owned(), table()));
        let weights = WeightIndex {
            tensors: tensors.into_iter().collect(),
        };
        let embedding = Op::Embedding {
            weight: "embed.weight".to_owned(),
            index: EmbeddingIndex::Tokens,
        };
        let mut graph = Graph {
            nodes: vec![embedding, Op::OutputRows { x: NodeId(0) }],
            output: NodeId(1),
            context_tokens_max: 16,
        };
        let valid = validate(graph.clone(), &weights, &GraphLimits::default()).expect("a graph");
        let said = notes(&valid, &weights);
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(
            said[0].contains("all but 2 of the 3 weights; it leaves out head.bias, layers.0.weight"),
            "{said:?}"
        );
        assert!(
            said[1].contains("ends in output-rows and gives no logits"),
            "{said:?}"
        );

        graph.nodes.push(Op::Logits {
            x: NodeId(1),
            weight: "embed.weight".to_owned(),
        });
        graph.output = NodeId(2);
        let valid = validate(graph, &weights, &GraphLimits::default()).expect("a graph");
        assert_eq!(notes(&valid, &weights).len(), 1);
    }
}
