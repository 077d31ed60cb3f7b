//! Llama 3's rope scaling, recovered from the factors that GGUF files keep instead of its parameters.

use serde_json::{Value, json};

/// Parameters every published Llama 3 model shares; only the factor differs.
const LOW_FREQUENCY_FACTOR: f64 = 1.0;
const HIGH_FREQUENCY_FACTOR: f64 = 4.0;
const ORIGINAL_CONTEXT_TOKENS: f64 = 8_192.0;

/// The `rope_scaling` entry whose factors are `factors` (one for each pair of a head), or `None` if there is none.
/// The formula is Llama 3.1's: long waves are slowed by the factor, short ones kept, those between blended.
pub(super) fn rope_scaling(factors: &[f32], theta: f64) -> Option<Value> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let fits = factors.iter().enumerate().all(|(pair, &got)| {
        let exponent = pair as f64 / factors.len() as f64;
        let wave_tokens = std::f64::consts::TAU * theta.powf(exponent);
        (expected_factor(wave_tokens, factor) - f64::from(got)).abs() <= 1e-4 * factor
    });
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW_FREQUENCY_FACTOR,
            "high_freq_factor": HIGH_FREQUENCY_FACTOR,
            "original_max_position_embeddings": ORIGINAL_CONTEXT_TOKENS as u64,
        })
    })
}

fn expected_factor(wave_tokens: f64, factor: f64) -> f64 {
    if wave_tokens < ORIGINAL_CONTEXT_TOKENS / HIGH_FREQUENCY_FACTOR {
        1.0
    } else if wave_tokens > ORIGINAL_CONTEXT_TOKENS / LOW_FREQUENCY_FACTOR {
        factor
    } else {
        let smooth = (ORIGINAL_CONTEXT_TOKENS / wave_tokens - LOW_FREQUENCY_FACTOR)
            / (HIGH_FREQUENCY_FACTOR - LOW_FREQUENCY_FACTOR);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

#[cfg(test)]
mod tests {
    use super::{expected_factor, rope_scaling};

    #[test]
    fn llama_3_factors_give_back_their_parameters() {
        let theta = 500_000.0_f64;
        let mut factors: Vec<f32> = (0..64)
            .map(|pair| {
                expected_factor(std::f64::consts::TAU * theta.powf(f64::from(pair) / 64.0), 8.0) as f32
            })
            .collect();
        assert_eq!(factors[0], 1.0);
        assert_eq!(factors[63], 8.0);
        let scaling = rope_scaling(&factors, theta).expect("recovered");
        assert_eq!(scaling["factor"], 8.0);
        assert_eq!(scaling["rope_type"], "llama3");
        factors[30] += 0.5;
        assert_eq!(rope_scaling(&factors, theta), None);
        assert_eq!(rope_scaling(&[f32::NAN; 64], theta), None);
    }
}
