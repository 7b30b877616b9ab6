//! What clients call the model that is served.

use std::path::Path;

use fathom_core::ModelConfig;

use crate::embedded;

/// The names of a model: the first is canonical, the others are answered too.
///
/// `given` are the operator's names; without any the released models are recognised by their
/// dimensions, and everything else is called as its directory. `directory` is `None` for the
/// embedded model, which in any case also answers to the name used in every client example.
pub(crate) fn served_names(
    given: &[String],
    directory: Option<&Path>,
    config: &ModelConfig,
) -> Vec<String> {
    let mut names = given.to_vec();
    if names.is_empty() {
        names.push(default_name(directory, config));
    }
    let stand_in = embedded::STANDS_IN_FOR.to_owned();
    if directory.is_none() && !names.contains(&stand_in) {
        names.push(stand_in);
    }
    names
}

fn default_name(directory: Option<&Path>, config: &ModelConfig) -> String {
    let Some(directory) = directory else { return embedded::NAME.to_owned() };
    match (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) {
        (4096, 43, 256) => "deepseek-v4-flash".to_owned(),
        (7168, 61, 384) => "deepseek-v4-pro".to_owned(),
        _ => {
            // `.` and symbolic links have no telling name of their own.
            let real = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
            let name = real.file_name().map(|name| name.to_string_lossy().into_owned());
            name.unwrap_or_else(|| "model".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nano() -> ModelConfig {
        embedded::checkpoint().unwrap().config().clone()
    }

    #[test]
    fn the_embedded_model_also_answers_to_the_name_in_client_examples() {
        assert_eq!(served_names(&[], None, &nano()), ["nano", "deepseek-v4-flash"]);
        let given = ["deepseek-v4-flash".to_owned(), "demo".to_owned()];
        assert_eq!(served_names(&given, None, &nano()), given);
    }

    #[test]
    fn released_models_are_known_by_their_dimensions() {
        let directory = Some(Path::new("/models/x"));
        let flash = ModelConfig {
            hidden_size: 4096,
            num_hidden_layers: 43,
            n_routed_experts: 256,
            ..nano()
        };
        assert_eq!(served_names(&[], directory, &flash), ["deepseek-v4-flash"]);
        let pro = ModelConfig {
            hidden_size: 7168,
            num_hidden_layers: 61,
            n_routed_experts: 384,
            ..nano()
        };
        assert_eq!(served_names(&[], directory, &pro), ["deepseek-v4-pro"]);
    }

    #[test]
    fn other_models_are_called_as_their_directory_and_names_given_replace_that() {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("my-model");
        std::fs::create_dir(&model).unwrap();
        assert_eq!(served_names(&[], Some(&model), &nano()), ["my-model"]);
        let inside = model.join(".");
        assert_eq!(served_names(&[], Some(&inside), &nano()), ["my-model"]);
        let given = ["a".to_owned(), "b".to_owned()];
        assert_eq!(served_names(&given, Some(&model), &nano()), given);
    }
}
