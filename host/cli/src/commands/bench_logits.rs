//! `galerne bench logits`: writes a model's logits for given tokens, to compare them with another engine's.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::device::{SequenceSlice, StepBatch};
use galerne_plugin::PluginHost;
use galerne_store::store::Store;

use crate::config::{DataArgs, DeviceArgs};
use crate::guests;
use crate::load::{self, LoadedModel};

/// Options of `galerne bench logits`.
#[derive(Debug, Args)]
pub(super) struct LogitsArgs {
    /// Model to run [default: the data folder's only one]
    #[arg(short, long)]
    model: Option<String>,
    /// Text file with one sequence a line: token ids with spaces between them
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Where the logits go: f32, little-endian, one row of the vocabulary's width per token, in the order of FILE
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(data: &DataArgs, args: &LogitsArgs) -> Result<()> {
    let sequences = read_sequences(&args.tokens)?;
    let store = Store::new(&data.folder()?);
    let name = match &args.model {
        Some(name) => name.clone(),
        None => super::bench::only_model(&store)?,
    };
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let device = load::device(&args.device)?.device;
    let mut model = load::load_program(&store.open(&name)?, &plugins, &*device, &args.device)?;
    let file = File::create(&args.out).with_context(|| format!("write {}", args.out.display()))?;
    let mut out = BufWriter::new(file);
    for tokens in &sequences {
        write_logits(&mut model, tokens, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

fn read_sequences(path: &Path) -> Result<Vec<Vec<TokenId>>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("read the tokens in {}", path.display()))?;
    let token = |word: &str| {
        let id = word
            .parse()
            .with_context(|| format!("--tokens: expected a token id, got \"{word}\""));
        id.map(TokenId)
    };
    let sequences: Vec<Vec<TokenId>> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.split_whitespace().map(token).collect())
        .collect::<Result<_>>()?;
    ensure!(
        !sequences.is_empty(),
        "--tokens: expected lines of token ids, {} is empty",
        path.display()
    );
    Ok(sequences)
}

/// Prefills one sequence in chunks of the model's step and writes every row.
fn write_logits(model: &mut LoadedModel, tokens: &[TokenId], out: &mut impl Write) -> Result<()> {
    let needed = tokens.len().div_ceil(model.limits.block_tokens);
    ensure!(
        needed <= model.limits.blocks && tokens.len() <= model.context_tokens_max as usize,
        "a sequence of {} tokens does not fit: the KV memory holds {} blocks of {} tokens, the model's context {}",
        tokens.len(),
        model.limits.blocks,
        model.limits.block_tokens,
        model.context_tokens_max
    );
    let blocks: Vec<BlockId> = (0..u32::try_from(needed)?).map(BlockId).collect();
    let chunks = tokens.chunks(model.limits.step_tokens_max);
    for (index, chunk) in chunks.enumerate() {
        model.program.submit(&StepBatch {
            tokens: chunk.to_vec(),
            sequences: vec![SequenceSlice {
                first_token: 0,
                tokens: chunk.len(),
                position: u32::try_from(index * model.limits.step_tokens_max)?,
                blocks: blocks.clone(),
            }],
            generating: 0,
            output_rows: (0..chunk.len()).collect(),
        })?;
        model.program.wait()?;
        for logit in model.program.read_output()? {
            out.write_all(&logit.to_le_bytes())?;
        }
    }
    Ok(())
}
