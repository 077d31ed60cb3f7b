//! 8-bit floats (e4m3 without infinities, as in "FP8 formats for deep learning", Micikevicius et al. 2022).

/// Largest finite number.
pub(crate) const LARGEST: f32 = 448.0;

/// The number of a code without sign, `0 ..= 126`.
pub(crate) fn value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3), f32::from(code & 7));
    if exponent == 0 {
        mantissa * 2f32.powi(-9)
    } else {
        (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
    }
}

/// The nearest code, ties to the even one; larger numbers become the largest.
pub(crate) fn code(x: f32) -> u8 {
    let size = x.abs().min(LARGEST);
    let plain = if size < 2f32.powi(-6) {
        (size * 512.0).round_ties_even() as u8
    } else {
        // An f32 has 20 more bits of mantissa and an exponent larger by 120; what is rounded off carries into it.
        let bits = size.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    plain | if x.is_sign_negative() { 0x80 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_nearest_to_itself() {
        for plain in 0..=126 {
            assert_eq!(code(value(plain)), plain);
            assert_eq!(code(-value(plain)), plain | 0x80);
        }
    }

    #[test]
    fn ties_go_to_even_and_large_numbers_saturate() {
        // 16 is 0x58, 18 is 0x59, 20 is 0x5a.
        assert_eq!([code(17.0), code(19.0), code(17.1)], [0x58, 0x5a, 0x59]);
        assert_eq!([code(1e9), code(-460.0)], [126, 126 | 0x80]);
        assert_eq!([code(2f32.powi(-10)), code(3.0 * 2f32.powi(-10))], [0, 2]);
        // Between the largest number without a whole exponent and the smallest with one.
        assert_eq!(code(7.6 * 2f32.powi(-9)), 8);
    }
}
