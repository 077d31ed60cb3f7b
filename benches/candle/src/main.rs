//! Measures candle's quantized llama: `candle-bench GGUF DECODE [PREFILL]...` prints one JSON object per figure.

use std::error::Error;
use std::fs::File;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("expected GGUF DECODE [PREFILL]...")?;
    let decode: usize = args
        .next()
        .ok_or("expected the number of tokens to decode")?
        .parse()?;
    let mut file = File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    forward(&mut model, 16, 0)?;
    for length in args {
        let length: usize = length.parse()?;
        let begin = Instant::now();
        forward(&mut model, length, 0)?;
        print(length, 0, length as f64 / begin.elapsed().as_secs_f64());
    }
    if decode > 0 {
        forward(&mut model, 1, 0)?;
        let begin = Instant::now();
        for position in 1..=decode {
            forward(&mut model, 1, position)?;
        }
        print(0, decode, decode as f64 / begin.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Computes tokens from a position on; position 0 begins a new sequence. Any tokens do.
fn forward(model: &mut ModelWeights, tokens: usize, position: usize) -> candle_core::Result<()> {
    let ids: Vec<u32> = (0..tokens)
        .map(|at| ((at + position) * 7_919 % 49_152) as u32)
        .collect();
    let input = Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    model.forward(&input, position)?.max_all()?.to_scalar::<f32>()?;
    Ok(())
}

fn print(prompt: usize, output: usize, tokens_per_s: f64) {
    println!("{{\"n_prompt\": {prompt}, \"n_gen\": {output}, \"avg_ts\": {tokens_per_s}}}");
}
