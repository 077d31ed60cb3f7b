//! An architecture, a filter and tools that do what a hostile author might, by a word in `config.json` or in the
//! others' parameters: for tests of the host.

mod filter;
mod tool;

use galerne_sdk::graph::GraphBuilder;
use galerne_sdk::json::Value;
use galerne_sdk::model::{Architecture, Error, Graph};

struct Hostile;

impl Architecture for Hostile {
    fn model_types() -> Vec<String> {
        vec!["hostile".to_owned()]
    }

    fn build(config: &Value) -> Result<Graph, Error> {
        match config["misbehave"].as_str().unwrap_or_default() {
            "loop" => spin(),
            "trap" => panic!("the guest gives up"),
            "alloc" => {
                hoard();
                Err(Error::Config("the host gave all memory".to_owned()))
            }
            "recurse" => Err(Error::Config(recurse(1).to_string())),
            "cycle" => Ok(cycle()),
            "shape" => Ok(wrong_shape()),
            "huge" => Ok(huge()),
            "refuse" => Err(Error::Unsupported("everything".to_owned())),
            other => Err(Error::Config(format!(
                "misbehave: expected a known word, got \"{other}\""
            ))),
        }
    }
}

galerne_sdk::export_model!(Hostile);

fn spin() -> ! {
    let mut counter = 0_u64;
    loop {
        counter = std::hint::black_box(counter.wrapping_add(1));
    }
}

/// Asks for memory up to all that a 32-bit guest could address; returns if it was given.
fn hoard() {
    let mut held: Vec<Vec<u8>> = Vec::new();
    while held.len() <= 256 {
        // Not written to, so that the limit on memory comes before the deadline on any machine.
        held.push(Vec::with_capacity(16 << 20));
        std::hint::black_box(&held);
    }
}

#[expect(unconditional_recursion, reason = "this guest overflows its stack on purpose")]
fn recurse(depth: u64) -> u64 {
    std::hint::black_box([depth; 64]);
    1 + recurse(std::hint::black_box(depth + 1))
}

/// The norm reads its own successor.
fn cycle() -> Graph {
    let m = GraphBuilder::new(64);
    let x = m.embedding("model.embed_tokens.weight");
    let mut graph = m.finish(
        x.scale(1.0)
            .scale(2.0)
            .output_rows()
            .logits("model.embed_tokens.weight"),
    );
    graph.nodes.swap(1, 2);
    graph
}

fn wrong_shape() -> Graph {
    let m = GraphBuilder::new(64);
    let x = m.embedding("model.embed_tokens.weight");
    m.finish(
        x.rms_norm("model.embed_tokens.weight", 1e-5)
            .output_rows()
            .logits("model.embed_tokens.weight"),
    )
}

/// Far more nodes than any model has.
fn huge() -> Graph {
    let m = GraphBuilder::new(64);
    let mut x = m.embedding("model.embed_tokens.weight");
    for _ in 0..200_000 {
        x = x.scale(1.0);
    }
    m.finish(x)
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    #[test]
    fn unknown_words_are_refused() {
        assert!(matches!(
            Hostile::build(&json!({"misbehave": "nicely"})),
            Err(Error::Config(_))
        ));
    }

    #[test]
    fn the_cycle_reads_a_later_node() {
        let graph = format!("{:?}", cycle().nodes[1]);
        assert!(graph.contains("x: 2") || graph.contains("x: 1"), "{graph}");
    }
}
