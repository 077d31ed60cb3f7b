//! The Llama architecture as a guest: grouped-query attention with rotary positions, SwiGLU feed-forward, RMS norms
//! (Touvron et al. 2023; Grattafiori et al. 2024 for the rope scaling). Also Mistral's, which differs by a window,
//! and Qwen 2's, which differs by biases on queries, keys and values.

mod config;
mod rope;

use galerne_sdk::graph::{Attention, GraphBuilder, Rope, Tensor};
use galerne_sdk::json::Value;
use galerne_sdk::model::{Architecture, Error, Graph};

use config::Config;

struct Llama;

impl Architecture for Llama {
    fn model_types() -> Vec<String> {
        config::MODEL_TYPES.map(str::to_owned).into()
    }

    fn build(config: &Value) -> Result<Graph, Error> {
        let config = Config::read(config)?;
        let m = GraphBuilder::new(config.context_tokens_max);
        let mut h = m.embedding("model.embed_tokens.weight");
        for layer in 0..config.layers {
            let part = |name: &str| format!("model.layers.{layer}.{name}");
            let x = h.rms_norm(&part("input_layernorm.weight"), config.norm_eps);
            h = h + attention(&m, &config, layer, x);
            let x = h.rms_norm(&part("post_attention_layernorm.weight"), config.norm_eps);
            h = h + feed_forward(&config, layer, x);
        }
        let x = h.output_rows().rms_norm("model.norm.weight", config.norm_eps);
        Ok(m.finish(x.logits(config.logits_weight())))
    }
}

galerne_sdk::export_model!(Llama);

fn attention<'a>(m: &'a GraphBuilder, config: &Config, layer: u32, x: Tensor<'a>) -> Tensor<'a> {
    let project = |x: Tensor<'a>, name: &str, bias: bool| {
        let name = format!("model.layers.{layer}.self_attn.{name}");
        let bias = bias.then(|| format!("{name}.bias"));
        x.linear_with_bias(&format!("{name}.weight"), bias.as_deref())
    };
    let rope: &Rope = &config.rope;
    let q = project(x, "q_proj", config.qkv_bias)
        .heads(config.heads)
        .rope(rope);
    let k = project(x, "k_proj", config.qkv_bias)
        .heads(config.kv_heads)
        .rope(rope);
    let v = project(x, "v_proj", config.qkv_bias).heads(config.kv_heads);
    let spec = Attention {
        layer,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_width: config.head_width,
        scale: 1.0 / (config.head_width as f32).sqrt(),
        causal: true,
        sliding_window: config.sliding_window,
        soft_cap: None,
    };
    project(m.attention(q, k, v, spec).join_heads(), "o_proj", config.o_bias)
}

fn feed_forward<'a>(config: &Config, layer: u32, x: Tensor<'a>) -> Tensor<'a> {
    let project = |x: Tensor<'a>, name: &str| {
        let name = format!("model.layers.{layer}.mlp.{name}");
        let bias = config.mlp_bias.then(|| format!("{name}.bias"));
        x.linear_with_bias(&format!("{name}.weight"), bias.as_deref())
    };
    let gated = project(x, "gate_proj").activate(config.activation) * project(x, "up_proj");
    project(gated, "down_proj")
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    fn tiny() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
            "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu"})
    }

    #[test]
    fn a_layer_has_the_papers_nodes() {
        let graph = Llama::build(&tiny()).expect("a graph");
        // Embedding, output rows, norm and logits; per layer 2 norms, 7 linears, 4 reshapes, 2 ropes, 1 attention,
        // 1 activation, 1 product, 2 sums.
        assert_eq!(graph.nodes.len(), 4 + 2 * 20);
        assert_eq!(graph.output as usize, graph.nodes.len() - 1);
        assert_eq!(graph.context_tokens_max, 512);
    }

    #[test]
    fn untied_and_tied_embeddings_differ_in_the_last_weight() {
        let last = |config: &Value| format!("{:?}", Llama::build(config).expect("a graph").nodes.last());
        let mut config = tiny();
        assert!(last(&config).contains("lm_head.weight"));
        config["tie_word_embeddings"] = json!(true);
        assert!(last(&config).contains("embed_tokens.weight"));
    }

    #[test]
    fn qwen2_has_biases_on_queries_keys_and_values_only() {
        let mut config = tiny();
        config["model_type"] = json!("qwen2");
        let graph = format!("{:?}", Llama::build(&config).expect("a graph").nodes);
        for name in ["q_proj", "k_proj", "v_proj"] {
            assert!(graph.contains(&format!("{name}.bias")), "{name}");
        }
        assert!(!graph.contains("o_proj.bias"));
    }

    #[test]
    fn qwen2_from_gguf_asks_for_no_bias_that_does_not_exist() {
        let mut config = tiny();
        config["model_type"] = json!("qwen2");
        config["attention_bias"] = json!(true);
        let graph = format!("{:?}", Llama::build(&config).expect("a graph").nodes);
        assert!(graph.contains("q_proj.bias") && !graph.contains("o_proj.bias"));
        config["model_type"] = json!("llama");
        let graph = format!("{:?}", Llama::build(&config).expect("a graph").nodes);
        assert!(graph.contains("o_proj.bias"));
    }

    #[test]
    fn head_width_window_and_heads_reach_the_attention() {
        let mut config = tiny();
        config["model_type"] = json!("mistral");
        config["head_dim"] = json!(32);
        config["sliding_window"] = json!(128);
        let graph = format!("{:?}", Llama::build(&config).expect("a graph").nodes);
        for part in [
            "heads: 4, kv-heads: 2, head-width: 32",
            "sliding-window: Some(128)",
            "rotated-width: 32",
        ] {
            assert!(graph.contains(part), "{part}: {graph}");
        }
    }

    #[test]
    fn wrong_configurations_name_the_field() {
        let cases = [
            ("hidden_size", Value::Null, "hidden_size"),
            ("num_hidden_layers", Value::Null, "num_hidden_layers"),
            ("rms_norm_eps", Value::Null, "rms_norm_eps"),
            ("max_position_embeddings", Value::Null, "max_position_embeddings"),
            ("model_type", Value::Null, "model_type"),
            ("model_type", json!("gemma"), "gemma"),
            ("hidden_act", json!(7), "hidden_act"),
            ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("num_attention_heads", json!(-4), "num_attention_heads"),
            ("num_key_value_heads", json!(3), "num_key_value_heads"),
            ("rms_norm_eps", json!("small"), "rms_norm_eps"),
            ("hidden_act", json!("swish9"), "swish9"),
            ("rope_scaling", json!({"rope_type": "spiral"}), "spiral"),
            ("num_hidden_layers", json!(1e12), "num_hidden_layers"),
        ];
        for (field, value, word) in cases {
            let mut config = tiny();
            config[field] = value;
            let (Err(Error::Config(text)) | Err(Error::Unsupported(text))) = Llama::build(&config) else {
                panic!("{field} was accepted");
            };
            assert!(text.contains(word), "{field}: {text}");
        }
    }
}
