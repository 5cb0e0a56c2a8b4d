//! Hugging Face's `config.json`, in and out: what is read, what is refused and by which key.

use std::collections::HashMap;

use polystage::model::rope::frequencies;
use polystage::model::{Kind, Model, ModelConfig, Purpose, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::models::{NAMES, json_config, tensors};

#[test]
fn a_config_that_was_read_is_written_and_read_again_the_same() {
    for name in NAMES {
        let model = Model::from_hugging_face(&json_config(name)).unwrap();
        let again = Model::from_hugging_face(&model.hugging_face_config()).unwrap();
        assert_eq!(model.config(), again.config(), "{name}");
        let text = toml::to_string(&HashMap::from([("model", model.config())])).unwrap();
        let back: HashMap<String, ModelConfig> = toml::from_str(&text).unwrap();
        assert_eq!(model.config(), &back["model"], "{name}");
    }
}

#[test]
fn parameters_are_the_tensors_of_the_file() {
    for name in NAMES {
        let model = Model::from_hugging_face(&json_config(name)).unwrap();
        let mut ours: Vec<(String, Vec<usize>)> = model
            .parameters()
            .into_iter()
            .filter(|p| p.tied_to.is_none())
            .map(|p| (p.name, p.shape))
            .collect();
        let mut theirs: Vec<(String, Vec<usize>)> =
            tensors(name, "model.safetensors").into_iter().map(|(n, (shape, _))| (n, shape)).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn a_model_in_an_experiment_file_may_write_whole_numbers_and_the_scaling_inline() {
    let text = "kind = 'llama'\nlayers = 1\nwidth = 24\nheads = 6\ncontext = 64\nvocabulary = 300\nkv_heads = 2\n\
        rope_theta = 500000\nrope_scaling = { rope_type = 'linear', factor = 2 }\n";
    let config: ModelConfig = toml::from_str(text).unwrap();
    assert_eq!(config.rope_theta(), 500_000.0);
    assert_eq!(config.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
    assert_eq!((config.head_dim(), config.intermediate()), (4, 64));
    let error = toml::from_str::<ModelConfig>(&text.replace("factor = 2", "factr = 2")).unwrap_err();
    assert!(error.to_string().contains("factr"), "{error}");
}

/// Llama 3.2 as the Hub has it, written by transformers 4.
fn llama3() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
    })
}

#[test]
fn configs_as_the_hub_has_them_are_read() {
    let model = Model::from_hugging_face(&llama3()).unwrap();
    let wanted = ModelConfig {
        kind: Kind::Llama,
        layers: 16,
        width: 2048,
        heads: 32,
        context: 131072,
        vocabulary: 128256,
        kv_heads: Some(8),
        intermediate: Some(8192),
        norm_epsilon: Some(1e-5),
        tied_head: Some(true),
        rope_theta: Some(500_000.0),
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }),
        ..Default::default()
    };
    assert_eq!(model.config(), &wanted);
    // 1.24 billion, as the model card says.
    assert_eq!(model.parameter_count(), 1_235_814_400);
    let mut qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936
    });
    // 0.49 billion, as the model card says.
    assert_eq!(Model::from_hugging_face(&qwen).unwrap().parameter_count(), 494_032_768);
    qwen["model_type"] = json!("qwen3");
    qwen["architectures"] = json!(["Qwen3ForCausalLM"]);
    assert_eq!(Model::from_hugging_face(&qwen).unwrap().config().head_dim(), 128, "what transformers takes");
    let mut old = llama3();
    for key in ["head_dim", "num_key_value_heads", "rope_scaling", "rope_theta", "tie_word_embeddings"] {
        old.as_object_mut().unwrap().remove(key);
    }
    let old = Model::from_hugging_face(&old).unwrap();
    let c = old.config();
    assert_eq!((c.head_dim(), c.kv_heads(), c.rope_theta(), c.tied_head()), (64, 32, 10_000.0, false));
}

#[test]
fn unsupported_settings_are_refused_by_their_key() {
    for (key, value) in [
        ("model_type", json!("mamba")),
        ("model_type", json!(null)),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_interleaved", json!(true)),
        ("partial_rotary_factor", json!(0.5)),
        ("quantization_config", json!({"bits": 4})),
        ("architectures", json!(["LlamaForSequenceClassification"])),
        ("layer_types", json!(["linear_attention"])),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "linear"})),
        ("rope_scaling", json!({"factor": 2.0})),
        ("rope_scaling", json!("llama3")),
        ("rope_parameters", json!({"rope_type": "longrope", "rope_theta": 1e4})),
        ("rms_norm_eps", json!("small")),
        ("tie_word_embeddings", json!(1)),
        ("hidden_size", json!(null)),
        ("vocab_size", json!(-1)),
        ("num_key_value_heads", json!("all")),
    ] {
        let mut config = llama3();
        config[key] = value.clone();
        let error = Model::from_hugging_face(&config).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(key), "{key} = {value}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_config_with_anything_in_any_key_is_read_or_refused_and_never_panics(
        name in prop::sample::select(NAMES.to_vec()),
        key in any::<prop::sample::Index>(),
        value in prop_oneof![
            Just(json!(null)), Just(json!(0)), Just(json!(1)), Just(json!(-1)), Just(json!(3.5)), Just(json!(1e300)),
            Just(json!(u64::MAX)), Just(json!(1u64 << 61)), Just(json!("x")), Just(json!([])), Just(json!({})),
            Just(json!([0])), Just(json!({"rope_type": "llama3", "factor": 0})), Just(json!(true)),
        ],
    ) {
        let mut config = json_config(name);
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        let key = key.get(&keys);
        config[key] = value;
        match Model::from_hugging_face(&config) {
            Ok(model) => {
                let again = Model::from_hugging_face(&model.hugging_face_config()).unwrap();
                prop_assert_eq!(model.config(), again.config());
            }
            Err(error) => {
                let error = error.to_string();
                prop_assert!(!error.contains('\n') && error.len() < 300, "{}", error);
            }
        }
    }
}

#[test]
fn extents_that_no_model_can_have_are_refused_by_their_key() {
    let good = ModelConfig {
        kind: Kind::Llama,
        layers: 1,
        width: 24,
        heads: 6,
        context: 8,
        vocabulary: 300,
        ..Default::default()
    };
    Model::new(&good).unwrap();
    let scaling = RopeScaling::Linear { factor: 0.0 };
    for (key, config) in [
        ("kv_heads", ModelConfig { kv_heads: Some(4), ..good.clone() }),
        ("kv_heads", ModelConfig { kv_heads: Some(0), ..good.clone() }),
        ("head_dim", ModelConfig { head_dim: Some(3), ..good.clone() }),
        ("heads", ModelConfig { heads: 7, ..good.clone() }),
        ("intermediate", ModelConfig { intermediate: Some(0), ..good.clone() }),
        ("norm_epsilon", ModelConfig { norm_epsilon: Some(f64::NAN), ..good.clone() }),
        ("rope_theta", ModelConfig { rope_theta: Some(0.0), ..good.clone() }),
        ("rope_scaling", ModelConfig { rope_scaling: Some(scaling), ..good.clone() }),
        ("rope_theta", ModelConfig { kind: Kind::Gpt2, rope_theta: Some(1e6), ..good.clone() }),
        ("kv_heads", ModelConfig { kind: Kind::Gpt2, kv_heads: Some(2), ..good.clone() }),
    ] {
        let error = Model::new(&config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("model.{key}: ")), "{key}: {error}");
    }
}

#[test]
fn a_sequence_beyond_the_context_or_the_sliding_window_is_refused() {
    let mut config = json_config("mistral");
    assert_eq!(config["sliding_window"], 21);
    let model = Model::from_hugging_face(&config).unwrap();
    let decode = Purpose::Decode { capacity: 22 };
    assert!(model.stage_graph(0..2, 1, 21, Purpose::Inference).is_ok());
    for error in [model.stage_graph(0..2, 1, 22, Purpose::Inference), model.stage_graph(0..2, 1, 1, decode)]
        .map(Result::err)
    {
        let error = error.unwrap();
        assert!(error.is_input() && error.to_string().contains("sliding_window"), "{error}");
    }
    config["sliding_window"] = json!(null);
    let model = Model::from_hugging_face(&config).unwrap();
    assert!(model.stage_graph(0..2, 1, 64, Purpose::Inference).is_ok());
    let error = model.stage_graph(0..2, 1, 65, Purpose::Inference).unwrap_err().to_string();
    assert!(error.contains("model.context"), "{error}");
}

#[test]
fn rotary_frequencies_are_pytorchs_to_the_bit() {
    // LlamaRotaryEmbedding(config).inv_freq of Llama 3.2: kept, blended and divided ones.
    let scaling = Model::from_hugging_face(&llama3()).unwrap().config().rope_scaling;
    let got = frequencies(500_000.0, 64, scaling);
    for (i, want) in [
        (0, 1.0f64),
        (1, 0.663601279258728),
        (13, 0.00483942124992609),
        (16, 0.000429556705057621),
        (17, 9.708286233944818e-05),
        (18, 1.9461638657958247e-05),
        (31, 9.418306490260875e-08),
    ] {
        assert_eq!(got[i] as f64, want, "frequency {i}");
    }
}
