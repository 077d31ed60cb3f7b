//! Rotary frequencies and their scaling schemes (Su et al. 2021; linear: Chen et al. 2023; llama3: Grattafiori et al. 2024).

use std::f64::consts::PI;

use galerne_sdk::graph::Rope;
use galerne_sdk::json::Value;
use galerne_sdk::model::{Error, RopePairing};

use crate::config::{Fields, field_error};

const THETA_DEFAULT: f64 = 10_000.0;

/// The rotation of heads of `head_width` elements. Newer configurations keep everything in `rope_parameters`,
/// older ones have `rope_theta` beside an optional `rope_scaling`.
pub(crate) fn read(config: &Value, head_width: u32) -> Result<Rope, Error> {
    let scaling = match &config["rope_parameters"] {
        Value::Null => &config["rope_scaling"],
        parameters => parameters,
    };
    let theta = match &scaling["rope_theta"] {
        Value::Null => Fields(config).number("rope_theta", THETA_DEFAULT)?,
        _ => Fields(scaling).number("rope_theta", THETA_DEFAULT)?,
    };
    if theta <= 1.0 {
        return Err(field_error("rope_theta", "a number above 1", &theta.to_string()));
    }
    if !head_width.is_multiple_of(2) {
        return Err(field_error(
            "head_dim",
            "an even number, for rotary positions",
            &head_width.to_string(),
        ));
    }
    let mut inv_freq: Vec<f64> = (0..head_width / 2)
        .map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(head_width)))
        .collect();
    scale(&mut inv_freq, scaling)?;
    let inv_freq = inv_freq.into_iter().map(|freq| freq as f32).collect();
    Ok(Rope {
        inv_freq,
        pairing: RopePairing::Half,
        attention_factor: 1.0,
    })
}

fn scale(inv_freq: &mut [f64], scaling: &Value) -> Result<(), Error> {
    if scaling.is_null() {
        return Ok(());
    }
    // "type" is the older name.
    let kind = scaling["rope_type"]
        .as_str()
        .or_else(|| scaling["type"].as_str())
        .unwrap_or("default");
    match kind {
        "default" => {}
        "linear" => {
            let factor = required(scaling, "factor")?;
            inv_freq.iter_mut().for_each(|freq| *freq /= factor);
        }
        "llama3" => {
            let llama3 = Llama3 {
                factor: required(scaling, "factor")?,
                low: required(scaling, "low_freq_factor")?,
                high: required(scaling, "high_freq_factor")?,
                context: required(scaling, "original_max_position_embeddings")?,
            };
            if llama3.high <= llama3.low {
                return Err(field_error(
                    "high_freq_factor",
                    "more than low_freq_factor",
                    &llama3.high.to_string(),
                ));
            }
            inv_freq.iter_mut().for_each(|freq| *freq = llama3.scale(*freq));
        }
        other => return Err(Error::Unsupported(format!("rope_scaling of type \"{other}\""))),
    }
    Ok(())
}

fn required(scaling: &Value, field: &str) -> Result<f64, Error> {
    let number = Fields(scaling).number(field, 0.0)?;
    if number > 0.0 {
        Ok(number)
    } else {
        Err(field_error(
            &format!("rope_scaling.{field}"),
            "a number above 0",
            &scaling[field].to_string(),
        ))
    }
}

/// Long wavelengths are stretched by `factor`, short ones kept, those between blended.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    fn scale(&self, freq: f64) -> f64 {
        let wavelength = 2.0 * PI / freq;
        if wavelength < self.context / self.high {
            return freq;
        }
        if wavelength > self.context / self.low {
            return freq / self.factor;
        }
        let smooth = (self.context / wavelength - self.low) / (self.high - self.low);
        (1.0 - smooth) * freq / self.factor + smooth * freq
    }
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    fn check(config: &Value, head_width: u32, expected: &[(usize, f64)]) {
        let rope = read(config, head_width).expect("a rotation");
        assert_eq!(rope.inv_freq.len(), head_width as usize / 2);
        for (index, value) in expected {
            let got = f64::from(rope.inv_freq[*index]);
            assert!(
                (got / value - 1.0).abs() < 1e-6,
                "inv_freq[{index}]: expected {value}, got {got}"
            );
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        check(
            &json!({}),
            64,
            &[(0, 1.0), (16, 0.01), (31, 1.333_521_432_163_324e-4)],
        );
        check(
            &json!({"rope_theta": 100_000.0}),
            64,
            &[(16, 0.003_162_277_660_168_379_5)],
        );
        check(
            &json!({"rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"}}),
            64,
            &[(16, 0.003_162_277_660_168_379_5)],
        );
    }

    #[test]
    fn linear_scaling_divides() {
        check(
            &json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
            64,
            &[(0, 0.25), (16, 0.0025)],
        );
    }

    /// Llama 3.1's parameters; expected numbers computed apart, in Python, from the published formula.
    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let config = json!({"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
        check(&config, 128, LLAMA3_EXPECTED);
    }

    const LLAMA3_EXPECTED: &[(usize, f64)] = &[
        (0, 1.0),
        (10, 0.12868737343265052),
        (28, 0.0032114459947525913),
        (29, 0.002166570763503359),
        (31, 0.0008567514129196321),
        (33, 0.00031269375038406517),
        (34, 0.00017850781276799638),
        (35, 9.556212353964683e-05),
        (50, 4.411534674558404e-06),
        (63, 3.068925988914511e-07),
    ];
}
