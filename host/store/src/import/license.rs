//! Licence names as models state them, as SPDX identifiers.

/// The SPDX identifier of a licence as Hugging Face names it; `None` if the name says nothing certain.
pub(super) fn spdx(name: &str) -> Option<String> {
    let known = [
        ("apache-2.0", "Apache-2.0"),
        ("mit", "MIT"),
        ("bsd-2-clause", "BSD-2-Clause"),
        ("bsd-3-clause", "BSD-3-Clause"),
        ("cc-by-4.0", "CC-BY-4.0"),
        ("cc-by-sa-4.0", "CC-BY-SA-4.0"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("cc0-1.0", "CC0-1.0"),
        ("gpl-3.0", "GPL-3.0-only"),
        ("agpl-3.0", "AGPL-3.0-only"),
        ("lgpl-3.0", "LGPL-3.0-only"),
        ("mpl-2.0", "MPL-2.0"),
        ("unlicense", "Unlicense"),
        ("llama2", "LicenseRef-Llama-2"),
        ("llama3", "LicenseRef-Llama-3"),
        ("llama3.1", "LicenseRef-Llama-3.1"),
        ("llama3.2", "LicenseRef-Llama-3.2"),
        ("gemma", "LicenseRef-Gemma"),
    ];
    let name = name.trim().to_ascii_lowercase();
    known
        .iter()
        .find(|(key, _)| *key == name)
        .map(|(_, id)| (*id).to_owned())
}

/// The licence stated in the front matter of a model card.
pub(super) fn of_model_card(readme: &str) -> Option<String> {
    let front = readme.strip_prefix("---")?.split("\n---").next()?;
    let line = front.lines().find_map(|line| line.strip_prefix("license:"))?;
    spdx(line.trim().trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::of_model_card;

    #[test]
    fn licences_come_from_the_front_matter_only() {
        assert_eq!(
            of_model_card("---\nlanguage: en\nlicense: \"mit\"\n---\n# x"),
            Some("MIT".into())
        );
        assert_eq!(of_model_card("# x\nlicense: mit\n"), None);
        assert_eq!(of_model_card("---\nlicense: other\n---\n"), None);
        assert_eq!(of_model_card("---\nname: x\n---\nlicense: mit\n"), None);
    }
}
