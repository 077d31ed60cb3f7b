//! Numbers: exact integers as far as 128 bits go, else floating point; and how they are written.

use std::fmt;

/// Decimal digits of a floating-point number that are surely right.
const DIGITS: usize = 15;

/// A value of an expression. Never infinite or not a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Number {
    /// Exact.
    Integer(i128),
    /// Rounded.
    Real(f64),
}

use Number::{Integer, Real};

impl Number {
    /// A value that may have become too large or undefined.
    pub(crate) fn real(value: f64) -> Result<Self, String> {
        if value.is_nan() {
            return Err("the value is not defined for real numbers".to_owned());
        }
        if value.is_infinite() {
            return Err("the value is too large: beyond 1.8e308".to_owned());
        }
        Ok(Real(value))
    }

    /// As floating point.
    pub(crate) fn as_real(self) -> f64 {
        match self {
            // Rounds to the nearest, which is what leaving the integers means.
            Integer(value) => value as f64,
            Real(value) => value,
        }
    }

    /// An integer if it is one, also when it was computed as floating point.
    pub(crate) fn as_integer(self) -> Option<i128> {
        /// Beyond 2^53 a floating-point number does not say which integer was meant.
        const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
        match self {
            Integer(value) => Some(value),
            Real(value) if value.fract() == 0.0 && value.abs() <= EXACT_MAX => Some(value as i128),
            Real(_) => None,
        }
    }

    /// With `exact` where both are integers and it has a value, else with `real`.
    fn with(
        self,
        other: Self,
        exact: fn(i128, i128) -> Option<i128>,
        real: fn(f64, f64) -> f64,
    ) -> Result<Self, String> {
        if let (Integer(left), Integer(right)) = (self, other)
            && let Some(value) = exact(left, right)
        {
            return Ok(Integer(value));
        }
        Self::real(real(self.as_real(), other.as_real()))
    }

    pub(crate) fn add(self, other: Self) -> Result<Self, String> {
        self.with(other, i128::checked_add, |left, right| left + right)
    }

    pub(crate) fn subtract(self, other: Self) -> Result<Self, String> {
        self.with(other, i128::checked_sub, |left, right| left - right)
    }

    pub(crate) fn multiply(self, other: Self) -> Result<Self, String> {
        self.with(other, i128::checked_mul, |left, right| left * right)
    }

    pub(crate) fn divide(self, other: Self) -> Result<Self, String> {
        if other.as_real() == 0.0 {
            return Err("division by zero".to_owned());
        }
        let exact = |left: i128, right: i128| match left.checked_rem(right) {
            Some(0) => left.checked_div(right),
            _ => None,
        };
        self.with(other, exact, |left, right| left / right)
    }

    /// With the sign of the divisor, as in mathematics and Python.
    pub(crate) fn remainder(self, other: Self) -> Result<Self, String> {
        if other.as_real() == 0.0 {
            return Err("remainder of a division by zero".to_owned());
        }
        let exact = |left: i128, right: i128| {
            let rest = left.checked_rem(right)?;
            let other_sign = rest != 0 && (rest < 0) != (right < 0);
            Some(if other_sign { rest + right } else { rest })
        };
        self.with(other, exact, |left, right| {
            let rest = left % right;
            let other_sign = rest != 0.0 && (rest < 0.0) != (right < 0.0);
            if other_sign { rest + right } else { rest }
        })
    }

    pub(crate) fn power(self, exponent: Self) -> Result<Self, String> {
        if self.as_real() == 0.0 && exponent.as_real() < 0.0 {
            return Err("zero to a negative power".to_owned());
        }
        let exact = |base: i128, exponent: i128| base.checked_pow(u32::try_from(exponent).ok()?);
        self.with(exponent, exact, f64::powf)
    }

    pub(crate) fn negate(self) -> Self {
        match self {
            Integer(value) => value.checked_neg().map_or(Real(-(value as f64)), Integer),
            Real(value) => Real(-value),
        }
    }
}

/// Plain decimals between 1e-7 and 1e21, else with an exponent; no zeros behind the last digit that counts.
impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = match self {
            Integer(value) => return value.fmt(f),
            Real(value) => *value,
        };
        // Rounded here once; what follows only moves the point.
        let scientific = format!("{value:.*e}", DIGITS - 1);
        let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let mantissa = if mantissa.contains('.') {
            mantissa.trim_end_matches('0').trim_end_matches('.')
        } else {
            mantissa
        };
        let exponent: i32 = exponent.parse().unwrap_or(0);
        if mantissa == "0" || mantissa == "-0" {
            return f.write_str("0");
        }
        if !(-7..21).contains(&exponent) {
            return write!(f, "{mantissa}e{exponent}");
        }
        let fraction_digits = mantissa.split_once('.').map_or(0, |(_, digits)| digits.len());
        let places = i32::try_from(fraction_digits).unwrap_or(0) - exponent;
        let rounded: f64 = format!("{mantissa}e{exponent}").parse().unwrap_or(value);
        write!(f, "{rounded:.*}", usize::try_from(places).unwrap_or(0))
    }
}
