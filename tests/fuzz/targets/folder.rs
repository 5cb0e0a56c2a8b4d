//! Hugging Face's folders: safetensors, models in one or several files, adapters.

use std::fs;
use std::path::Path;

use polystage::folder::{Dtype, FolderWriter, Kind, Layout, Tensors};
use polystage::model::Model;
use polystage::train::source::Pretrained;
use serde_json::{Value, json};

use super::{Target, outcome, parts, whole};

const DTYPES: &str = r#"
        "dtype" "shape" "data_offsets" "__metadata__" "F32" "F16" "BF16" "F64" "I8" "F4" "BOOL" [0,0] [0] []
        { } [ ] : ,"#;

/// A file of tensors: its bytes, or the text of its header, for which the rest is made.
pub static SAFETENSORS: Target = Target {
    name: "safetensors",
    words: DTYPES,
    seeds: |_| {
        let header = concat!(
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"#,
            r#""b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]},"c":{"dtype":"F16","shape":[0,4],"data_offsets":[26,26]},"#,
            r#""d.attn.bias":{"dtype":"BOOL","shape":[1],"data_offsets":[26,27]},"e":{"dtype":"F16","shape":[1,3],"data_offsets":[27,33]}}"#,
        );
        vec![header.as_bytes().to_vec(), file(header.as_bytes())]
    },
    run: |folder, input| {
        let path = folder.join("file.safetensors");
        let bytes = if input.first() == Some(&b'{') { file(input) } else { input.to_vec() };
        fs::write(&path, bytes).expect("written");
        outcome(Tensors::open(&path).and_then(|tensors| read(&tensors)))
    },
};

/// A whole file for a header: its length before it, and behind it as many zeros as it speaks of.
pub fn file(header: &[u8]) -> Vec<u8> {
    let json: Value = serde_json::from_slice(header).unwrap_or_default();
    let ends =
        json.as_object().into_iter().flatten().filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
    let data = ends.max().unwrap_or(0).min(1 << 20) as usize;
    [&(header.len() as u64).to_le_bytes(), header, &vec![0; data]].concat()
}

/// Reads every tensor in every way.
pub fn read(tensors: &Tensors) -> polystage::Result<String> {
    let mut elements = 0;
    for info in tensors.iter() {
        let values = tensors.read_all(&info.name)?;
        tensors.read_bf16(&info.name, 0..values.len(), &mut vec![0; values.len()])?;
        let mut bytes = 0;
        tensors.raw(&info.name, 0..values.len(), |piece| bytes += piece.len())?;
        assert_eq!(bytes, values.len() * info.dtype.size());
        elements += values.len();
    }
    Ok(format!("{} tensors, {elements} elements", tensors.len()))
}

/// `config.json`, the index, and the headers of two files; without an index, of the only one.
pub static MODEL_FOLDER: Target = Target {
    name: "model-folder",
    words: r#"
        "weight_map" "metadata" "total_size" "a.safetensors" "b.safetensors" "../a.safetensors" "/dev/zero"
        "." "transformer.wte.weight" "wte.weight" "lm_head.weight" "n_layer" "dtype" "shape" "data_offsets"
        "F32" "BF16" { } [ ] : ,"#,
    seeds: |_| {
        let model = tiny();
        let all = headers(&model, 1);
        let [a, b] = headers(&model, 2).try_into().expect("two");
        let config = model.hugging_face_config().to_string();
        let map: serde_json::Map<String, Value> = [("a.safetensors", &a), ("b.safetensors", &b)]
            .into_iter()
            .flat_map(|(file, header)| {
                let json: Value = serde_json::from_str(header).expect("JSON");
                let names: Vec<String> = json.as_object().expect("an object").keys().cloned().collect();
                names.into_iter().map(move |name| (name, json!(file)))
            })
            .collect();
        let index = json!({"metadata": {"total_size": 100}, "weight_map": map}).to_string();
        let bare = all[0].replace("transformer.", "").replace("F32", "BF16");
        vec![
            whole(&[&config, &index, &a, &b]),
            whole(&[&config, "", &all[0]]),
            whole(&[&config, "", &half(&bare)]),
        ]
    },
    run: |folder, input| {
        let [config, index, a, b] = parts(input);
        let index_name = Kind::Model.index_name();
        let names = if index.is_empty() {
            let _ = fs::remove_file(folder.join(&index_name));
            [Kind::Model.weights_name(), "unused"]
        } else {
            let _ = fs::remove_file(folder.join(Kind::Model.weights_name()));
            fs::write(folder.join(&index_name), index).expect("written");
            ["a.safetensors", "b.safetensors"]
        };
        fs::write(folder.join(Kind::Model.config_name()), config).expect("written");
        names
            .iter()
            .zip([a, b])
            .for_each(|(name, header)| fs::write(folder.join(name), file(header)).expect("written"));
        outcome(Pretrained::open(folder).and_then(|pretrained| check(&pretrained)))
    },
};

/// Compares an open model's tensors with those it needs, as loading it does, and reads them.
fn check(pretrained: &Pretrained) -> polystage::Result<String> {
    let parameters = pretrained.model.parameters();
    let needed = parameters.iter().filter(|p| !p.name.contains("lora_"));
    let needed: Vec<(String, Vec<usize>)> = needed.map(|p| (p.name.clone(), p.shape.clone())).collect();
    let tied: Vec<String> =
        parameters.iter().filter(|p| p.tied_to.is_some()).map(|p| p.name.clone()).collect();
    let tensors = pretrained.folder.tensors();
    tensors.check(&needed, &tied)?;
    read(tensors)
}

/// A model of a few hundred bytes.
fn tiny() -> Model {
    let config = json!({"model_type": "gpt2", "n_layer": 1, "n_embd": 2, "n_head": 1, "n_positions": 2, "vocab_size": 3});
    Model::from_hugging_face(&config).expect("a model")
}

/// The headers of a model's tensors in so many files.
fn headers(model: &Model, files: usize) -> Vec<String> {
    let parameters = model.parameters();
    let owned: Vec<_> = parameters.iter().filter(|p| p.tied_to.is_none()).collect();
    let header = |part: &[&polystage::model::Parameter]| {
        let mut at = 0;
        let mut json = serde_json::Map::new();
        for p in part {
            let end = at + 4 * p.len();
            json.insert(p.name.clone(), json!({"dtype": "F32", "shape": p.shape, "data_offsets": [at, end]}));
            at = end;
        }
        Value::Object(json).to_string()
    };
    owned.chunks(owned.len().div_ceil(files)).map(header).collect()
}

/// The same header for elements of half as many bytes.
fn half(header: &str) -> String {
    let mut json: Value = serde_json::from_str(header).expect("JSON");
    for (_, tensor) in json.as_object_mut().expect("an object") {
        for end in 0..2 {
            tensor["data_offsets"][end] = json!(tensor["data_offsets"][end].as_u64().expect("a number") / 2);
        }
    }
    json.to_string()
}

/// PEFT's configuration, and the header of its tensors; the base model is there.
pub static ADAPTER: Target = Target {
    name: "adapter",
    words: r#"
        "peft_type" "LORA" "r" "lora_alpha" "lora_dropout" "target_modules" "bias" "none" "fan_in_fan_out"
        "use_rslora" "use_dora" "modules_to_save" "rank_pattern" "base_model_name_or_path" "base" "c_attn"
        "all-linear" ".*" "(a|b)*\\1" "(?=(.*)*x)" "(x{900}){900}" ".lora_A.weight" .lora_B.weight
        base_model.model. "dtype" "shape" "data_offsets" null true { } [ ] : ,"#,
    seeds: |folder| {
        let model = tiny();
        let parameters = model.parameters();
        let tensors =
            parameters.iter().filter(|p| p.tied_to.is_none()).map(|p| (p.name.clone(), p.shape.clone()));
        let config = model.hugging_face_config();
        write(&folder.join("base"), &config, &tensors.collect::<Vec<_>>());
        let config = |targets: Value| {
            json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 1, "lora_alpha": 16,
                "lora_dropout": 0.0, "target_modules": targets, "bias": "none", "fan_in_fan_out": true,
                "modules_to_save": null, "rank_pattern": {}, "use_dora": false, "inference_mode": true})
            .to_string()
        };
        let header = json!({
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
            "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": {"dtype": "F32", "shape": [6, 1], "data_offsets": [8, 32]},
        })
        .to_string();
        vec![
            whole(&[&config(json!(["c_attn"])), &header]),
            whole(&[&config(json!(".*c_(attn|fc)")), &header]),
            whole(&[&config(json!("all-linear")), &header]),
        ]
    },
    run: |folder, input| {
        let [config, header] = parts(input);
        fs::write(folder.join(Kind::Adapter.config_name()), config).expect("written");
        fs::write(folder.join(Kind::Adapter.weights_name()), file(header)).expect("written");
        outcome(Pretrained::open(folder).and_then(|pretrained| {
            let (adapter, _) = pretrained.adapter.as_ref().expect("an adapter");
            read(&adapter.tensors)?;
            let again = polystage::folder::adapter::AdapterConfig::from_json(&adapter.config.to_json());
            assert_eq!(again.expect("what was written is read"), adapter.config);
            let modules = adapter.config.targets.select(&pretrained.model.linear_layers())?;
            Ok(format!("{} modules, {} parameters", modules.len(), pretrained.model.parameter_count()))
        }))
    },
};

fn write(path: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    let layout =
        Layout { kind: Kind::Model, config, tensors, dtype: Dtype::F32, shard_bytes: u64::MAX, copy: &[] };
    let mut writer = FolderWriter::create(path, &layout).expect("a folder");
    for (name, shape) in tensors {
        writer.write(name, &vec![0.5; shape.iter().product()]).expect("written");
    }
    writer.finish().expect("written");
}
