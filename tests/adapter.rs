//! PEFT's LoRA adapters.

use std::fs;

use polystage::folder::adapter::{self, AdapterConfig, Module, Targets};
use polystage::model::Linear;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::folder::{NONE, folder, message, safetensors, values};

fn adapter_config() -> AdapterConfig {
    AdapterConfig {
        r: 2,
        alpha: 16.0,
        use_rslora: false,
        targets: Targets::Names(vec!["q_proj".into(), "v_proj".into()]),
        dropout: 0.0,
        fan_in_fan_out: false,
        base_model: Some("base".into()),
        task_type: Some("CAUSAL_LM".into()),
    }
}

/// What PEFT 0.21.2 writes for a default configuration.
fn peft() -> Value {
    json!({
        "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": null, "peft_version": "0.21.2",
        "base_model_name_or_path": "base", "revision": null, "inference_mode": true, "r": 2,
        "target_modules": ["v_proj", "q_proj"], "exclude_modules": null, "lora_alpha": 16, "lora_dropout": 0.0,
        "fan_in_fan_out": false, "bias": "none", "use_rslora": false, "modules_to_save": null,
        "init_lora_weights": true, "layers_to_transform": null, "layers_pattern": null, "rank_pattern": {},
        "alpha_pattern": {}, "megatron_config": null, "megatron_core": "megatron.core",
        "trainable_token_indices": null, "loftq_config": {}, "eva_config": null, "corda_config": null,
        "lora_ga_config": null, "use_dora": false, "velora_config": null, "alora_invocation_tokens": null,
        "use_qalora": false, "qalora_group_size": 16, "monteclora_config": null, "layer_replication": null,
        "lora_bias": false, "target_parameters": null, "use_bdlora": null, "arrow_config": null,
        "kasa_config": null, "ensure_weight_tying": false,
    })
}

#[test]
fn an_adapter_comes_back_as_it_was_written_under_pefts_names() {
    let root = folder();
    let path = root.path().join("adapter");
    let modules: Vec<Module> =
        [("model.layers.0.self_attn.q_proj", 6, 4), ("model.layers.1.self_attn.v_proj", 6, 3)]
            .map(|(name, inputs, outputs)| Module { name: name.into(), inputs, outputs })
            .into();
    let config = adapter_config();
    let mut writer = adapter::create(&path, &config, &modules, NONE).expect("created");
    for (name, shape) in adapter::tensors(&modules, 2) {
        writer.write(&name, &values(&name, shape.iter().product())).expect("written");
    }
    writer.finish().expect("finished");
    let bytes = fs::read(path.join("adapter_model.safetensors")).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("valid");
    let a =
        file.tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").expect("PEFT's name");
    assert_eq!(a.shape(), [2, 6]);
    let read = adapter::open(&path).expect("opened");
    assert_eq!((&read.config, &read.modules), (&config, &modules));
    let name = format!("base_model.model.{}", modules[1].b());
    assert_eq!(read.tensors.read_all(&modules[1].b()).expect("read"), values(&name, 6));
}

#[test]
fn a_configuration_of_pefts_is_read_and_settings_that_are_not_computed_here_are_named() {
    assert_eq!(AdapterConfig::from_json(&peft()).expect("read"), adapter_config());
    assert_eq!(AdapterConfig::from_json(&adapter_config().to_json()).expect("read"), adapter_config());
    for (key, value, wanted) in [
        ("peft_type", json!("IA3"), "peft_type = \"IA3\" is not supported"),
        ("bias", json!("all"), "bias = \"all\" is not supported; known: \"none\""),
        ("use_dora", json!(true), "use_dora = true is not supported"),
        ("rank_pattern", json!({"q": 4}), "rank_pattern = {\"q\":4} is not supported"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save = [\"lm_head\"] is not supported"),
        ("layers_to_transform", json!([0]), "layers_to_transform"),
        ("init_lora_weights", json!("pissa"), "init_lora_weights = \"pissa\" is not supported"),
        ("use_new_thing", json!(true), "use_new_thing = true is not supported; it is not known here"),
        ("r", json!(0), "r = 0 must be a whole number"),
        ("r", json!(2.5), "r = 2.5 must be"),
        ("lora_alpha", json!("x"), "lora_alpha = \"x\" is not a number"),
        ("use_rslora", json!(1), "use_rslora = 1 is neither"),
        ("target_modules", json!([]), "target_modules = [] is neither names nor a pattern"),
        ("target_modules", json!(null), "target_modules = null"),
    ] {
        let mut config = peft();
        config[key] = value;
        let refused = message(AdapterConfig::from_json(&config));
        assert!(refused.starts_with("adapter_config.json: ") && refused.contains(wanted), "{refused}");
    }
    let mut dropped = adapter_config();
    assert!(dropped.check_trainable().is_ok());
    dropped.dropout = 0.05;
    assert!(message(dropped.check_trainable()).contains("lora_dropout = 0.05 is not supported in training"));
    assert_eq!(adapter_config().scale(), 8.0);
    let stable = AdapterConfig { use_rslora: true, r: 4, ..adapter_config() };
    assert_eq!(stable.scale(), 8.0);
}

#[test]
fn targets_are_whole_names_behind_a_dot_or_patterns_of_whole_names() {
    let names = [
        "q_proj",
        "layers.0.q_proj",
        "layers.0.mlp.up",
        "layers.0.xq_proj",
        "layers.0.q_proj.x",
        "up",
        "lm_head",
    ];
    let layer = |name: &str| Linear { name: name.into(), inputs: 2, outputs: 3, inputs_first: false };
    let layers = names.map(layer);
    let select = |targets: Targets| targets.select(&layers);
    let named = |names: &[&str]| select(Targets::Names(names.iter().map(|n| n.to_string()).collect()));
    assert_eq!(named(&["q_proj", "mlp.up"]).expect("selected"), names[..3]);
    assert_eq!(named(&["lm_head"]).expect("selected"), ["lm_head"]);
    assert!(
        message(named(&["q_proj", "v_proj"]))
            .contains("\"v_proj\" is no linear layer of this model; known: lm_head")
    );
    let pattern = |text: &str| select(Targets::Pattern(text.into()));
    assert_eq!(pattern("all-linear").expect("selected"), names[..6]);
    assert_eq!(pattern(r"layers\.\d+\.(q_proj|mlp\.up)").expect("selected"), names[1..3]);
    assert_eq!(pattern(r"^(?!layers).*(_proj|up)$").expect("selected"), ["q_proj", "up"]);
    assert!(message(pattern("q_pro")).contains("\"q_pro\" is no linear layer"), "the whole name must match");
    assert!(message(pattern("(")).contains("nor a regular expression"));
}

#[test]
fn a_pattern_that_goes_back_over_and_over_is_refused_at_the_first_name() {
    let layer = Linear { name: "a".repeat(24), inputs: 2, outputs: 3, inputs_first: false };
    let targets = Targets::Pattern(r"(?:(?=a)a|(?=a)aa)*b".into());
    assert!(message(targets.select(&[layer])).contains("nor a regular expression: "));
}

#[test]
fn adapter_tensors_that_are_no_pair_of_lora_matrices_are_refused() {
    let open = |tensors: &[(&str, &[usize])]| {
        let folder = folder();
        fs::write(folder.path().join("adapter_config.json"), peft().to_string()).expect("written");
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let bytes = 4 * shape.iter().product::<usize>();
            let info = json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + bytes]});
            header.insert(name.to_string(), info);
            end += bytes;
        }
        let file = safetensors(&Value::from(header).to_string(), &vec![0; end]);
        fs::write(folder.path().join("adapter_model.safetensors"), file).expect("written");
        adapter::open(folder.path())
    };
    let (a, b) = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight");
    assert!(open(&[(a, &[2, 5]), (b, &[3, 2])]).is_ok());
    assert!(message(open(&[(a, &[2, 5])])).contains("module \"q\" has lora_A and lacks lora_B"));
    assert!(message(open(&[(b, &[3, 2])])).contains("module \"q\" has lora_B and lacks lora_A"));
    assert!(message(open(&[(a, &[5, 2]), (b, &[3, 2])])).contains("for r = 2 they must be [2, inputs]"));
    assert!(message(open(&[(a, &[2, 5]), (b, &[2, 3])])).contains("and [outputs, 2]"));
    assert!(
        message(open(&[("base_model.model.q.lora_magnitude_vector", &[2])])).contains("is no LoRA matrix")
    );
    assert!(message(open(&[("q.lora_A.weight", &[2, 2])])).contains("is no LoRA matrix"));
    assert!(message(open(&[])).contains("holds no LoRA matrix"));
}

proptest! {
    #[test]
    fn a_damaged_adapter_configuration_is_an_error_or_a_configuration_and_never_a_panic(
        at in 0.0..1.0f64, flip in 1u8.., cut in any::<bool>(),
    ) {
        let mut bytes = peft().to_string().into_bytes();
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        let folder = folder();
        fs::write(folder.path().join("adapter_config.json"), bytes).expect("written");
        // There are no weights, so it is an error in any case.
        prop_assert_eq!(adapter::open(folder.path()).expect_err("an error").to_string().lines().count(), 1);
    }
}
