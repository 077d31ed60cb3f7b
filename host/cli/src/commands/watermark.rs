//! `galerne watermark`: counts green tokens in a text and says how unlikely so many are by chance.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use galerne_core::ids::TokenId;
use galerne_store::store::Store;

use crate::config::DataArgs;

// The sampler's own file: whoever counts must see what it saw.
#[path = "../../../../plugins/watermark/src/green.rs"]
mod green;

/// Above this the text is said to be marked: by chance one text in 30,000 is.
const Z_MARKED: f64 = 4.0;

/// Options of `galerne watermark`.
#[derive(Debug, Args)]
pub(super) struct WatermarkArgs {
    /// The text [default: standard input]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The key the sampler was given, 32 hexadecimal digits
    #[arg(
        long,
        value_name = "HEX",
        env = "GALERNE_WATERMARK_KEY",
        hide_env_values = true
    )]
    key: String,
    /// The green part the sampler was given
    #[arg(long, default_value = "0.25")]
    gamma: f64,
    /// The model whose tokens the text is of [default: the data folder's only one]
    #[arg(short, long)]
    model: Option<String>,
}

pub(super) fn run(data: &DataArgs, args: &WatermarkArgs) -> Result<()> {
    let green = green::Green::new(&args.key, args.gamma).map_err(|reason| anyhow::anyhow!("--{reason}"))?;
    let mut text = String::new();
    match &args.file {
        Some(file) => {
            text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        }
        None => {
            std::io::stdin()
                .read_to_string(&mut text)
                .context("read standard input")?;
        }
    }
    let store = Store::new(&data.folder()?);
    let name = match &args.model {
        Some(name) => name.clone(),
        None => super::bench::only_model(&store)?,
    };
    let tokens = store.open(&name)?.tokenizer()?.encode(&text)?;
    let found = count(&green, &tokens);
    ensure!(
        found.pairs > 0,
        "the text has {} tokens of model \"{name}\"; expected at least 2",
        tokens.len()
    );
    let z = found.z(green.gamma);
    println!("pairs     {}, each counted once", found.pairs);
    println!(
        "green     {} ({:.1} %; {:.1} % by chance)",
        found.green,
        found.percent(),
        100.0 * green.gamma
    );
    println!("z         {z:.2}");
    println!(
        "verdict   {}",
        if z >= Z_MARKED {
            "marked with this key"
        } else {
            "no mark of this key found"
        }
    );
    Ok(())
}

/// What a text's tokens show.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// Tokens with one before them. A pair that comes again says nothing new.
    pairs: usize,
    /// Of these, green ones.
    green: usize,
}

fn count(green: &green::Green, tokens: &[TokenId]) -> Found {
    let pairs: BTreeSet<(u32, u32)> = tokens.windows(2).map(|pair| (pair[0].0, pair[1].0)).collect();
    let is_green = |(before, token): &&(u32, u32)| green.is_green(*before, *token);
    Found {
        pairs: pairs.len(),
        green: pairs.iter().filter(is_green).count(),
    }
}

impl Found {
    fn percent(&self) -> f64 {
        100.0 * self.green as f64 / self.pairs as f64
    }

    /// Standard deviations above what chance gives (equation 3 of the paper).
    fn z(&self, gamma: f64) -> f64 {
        let pairs = self.pairs as f64;
        (self.green as f64 - gamma * pairs) / (pairs * gamma * (1.0 - gamma)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f";

    #[test]
    fn a_pair_counts_once_and_chance_is_near_zero() {
        let green = green::Green::new(KEY, 0.25).expect("a key");
        let repeated: Vec<TokenId> = [5, 6].repeat(100).into_iter().map(TokenId).collect();
        assert_eq!(count(&green, &repeated).pairs, 2);
        let text: Vec<TokenId> = (0..2_000_u32)
            .map(|place| TokenId(place * 7919 % 49_152))
            .collect();
        let found = count(&green, &text);
        assert!(found.z(0.25).abs() < 3.5, "{found:?}");
    }

    #[test]
    fn z_is_that_of_the_paper() {
        let found = Found {
            pairs: 200,
            green: 71,
        };
        // (71 - 50) / sqrt(200 * 0.25 * 0.75) = 3.43
        assert!((found.z(0.25) - 3.429).abs() < 1e-3);
    }
}
