//! Model folders: what is read and refused, and what is written.

use std::fs;
use std::path::{Path, PathBuf};

use polystage::Error;
use polystage::folder::{Dtype, FolderWriter, Kind, Layout, ModelFolder, Tensors};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// The error's one line.
pub fn message<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(error.is_input(), "{error:?}");
    assert_eq!(error.to_string().lines().count(), 1);
    error.to_string()
}

/// A safetensors file with this header and this data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn specs(tensors: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
    tensors.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
}

/// The values of a tensor: its elements' numbers, shifted by the length of its name.
pub fn values(name: &str, len: usize) -> Vec<f32> {
    (0..len).map(|i| i as f32 * 0.25 - name.len() as f32).collect()
}

pub const NONE: &[PathBuf] = &[];

fn write(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    dtype: Dtype,
    shard_bytes: u64,
) -> polystage::Result<()> {
    let config = json!({"model_type": "x", "torch_dtype": "float32"});
    let layout = Layout { kind: Kind::Model, config: &config, tensors, dtype, shard_bytes, copy: NONE };
    let mut writer = FolderWriter::create(path, &layout)?;
    for (name, shape) in tensors {
        // In two pieces, to show that pieces are joined.
        let values = values(name, shape.iter().product());
        let (one, two) = values.split_at(values.len() / 3);
        writer.write(name, one)?;
        writer.write(name, two)?;
    }
    writer.finish()
}

/// A folder with config.json and these files.
fn model(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = folder();
    fs::write(folder.path().join("config.json"), "{}").expect("written");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("written");
    }
    folder
}

fn one(name: &str, value: f32) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    safetensors(&header, &value.to_le_bytes())
}

const SPECS: &[(&str, &[usize])] =
    &[("a", &[3, 5]), ("bb", &[7]), ("empty", &[0, 4]), ("c", &[]), ("dddd", &[2, 2, 2])];

#[test]
fn what_is_written_is_read_in_any_range_in_every_type_and_sharding() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for shard_bytes in [u64::MAX, 30, 1] {
            let root = folder();
            let path = root.path().join("new/model");
            let specs = specs(SPECS);
            write(&path, &specs, dtype, shard_bytes).expect("written");
            let index = path.join("model.safetensors.index.json");
            assert_eq!(index.exists(), shard_bytes != u64::MAX);
            assert_eq!(path.join("model.safetensors").exists(), shard_bytes == u64::MAX);
            let folder = ModelFolder::open(&path).expect("opened");
            assert_eq!(folder.config()["torch_dtype"], dtype.torch_name());
            let tensors = folder.tensors();
            assert_eq!(tensors.len(), 5);
            for info in tensors.iter() {
                let wanted = values(&info.name, info.len());
                assert_eq!(info.dtype, dtype);
                assert_eq!(tensors.read_all(&info.name).expect("read"), wanted);
                for start in 0..=info.len() {
                    for end in start..=info.len() {
                        let (mut out, mut bits) = (vec![0.0; end - start], vec![0; end - start]);
                        tensors.read(&info.name, start..end, &mut out).expect("read");
                        assert_eq!(out, wanted[start..end]);
                        tensors.read_bf16(&info.name, start..end, &mut bits).expect("read");
                        let upper: Vec<u16> = out.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
                        assert_eq!(bits, upper);
                    }
                }
            }
        }
    }
}

#[test]
fn shards_have_at_most_their_bytes_and_the_index_is_transformers() {
    let root = folder();
    let path = root.path().join("model");
    write(&path, &specs(SPECS), Dtype::BF16, 30).expect("written");
    let index: Value =
        serde_json::from_slice(&fs::read(path.join("model.safetensors.index.json")).expect("read"))
            .expect("JSON");
    assert_eq!(index["metadata"]["total_size"], 2 * (15 + 7 + 1 + 8));
    let map = index["weight_map"].as_object().expect("a map");
    assert_eq!(map["a"], "model-00001-of-00003.safetensors");
    assert_eq!(map["bb"], "model-00002-of-00003.safetensors");
    assert_eq!(map["c"], "model-00002-of-00003.safetensors");
    assert_eq!(map["dddd"], "model-00003-of-00003.safetensors");
    for name in ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"] {
        let bytes = fs::read(path.join(name)).expect("read");
        let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        assert_eq!(header % 8, 0, "the data is aligned");
        assert!(bytes.len() as u64 - 8 - header <= 30);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("valid");
        assert_eq!(metadata.metadata().as_ref().expect("metadata")["format"], "pt");
    }
}

#[test]
fn numbers_are_rounded_to_the_nearest_even_and_f16_refuses_what_it_cannot_hold() {
    let root = folder();
    let specs = specs(&[("x", &[6])]);
    let path = root.path().join("bf16");
    let config = json!({});
    let layout = |dtype| Layout {
        kind: Kind::Model,
        config: &config,
        tensors: &specs,
        dtype,
        shard_bytes: 1,
        copy: NONE,
    };
    let mut writer = FolderWriter::create(&path, &layout(Dtype::BF16)).expect("created");
    let given =
        [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f80_0000, 0x7fc0_0000, 0x8000_0001].map(f32::from_bits);
    writer.write("x", &given).expect("written");
    writer.finish().expect("finished");
    let read = ModelFolder::open(&path).expect("opened").tensors().read_all("x").expect("read");
    let bits: Vec<u32> = read.iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits, [0x3f80_0000, 0x3f82_0000, 0x3f81_0000, 0x7f80_0000, 0x7fc0_0000, 0x8000_0000]);

    let mut writer = FolderWriter::create(&root.path().join("f16"), &layout(Dtype::F16)).expect("created");
    writer.write("x", &[f32::INFINITY, 65_504.0, -65_519.0]).expect("they fit");
    let refused = message(writer.write("x", &[65_520.0]));
    assert!(refused.contains("\"x\" has the value 65520, too large for F16"), "{refused}");
    drop(writer);
    assert_eq!(fs::read_dir(root.path()).expect("listed").count(), 1, "nothing unfinished is left");
}

#[test]
fn a_writer_refuses_other_orders_sizes_and_names_and_leaves_nothing() {
    let root = folder();
    let path = root.path().join("model");
    let config = json!({});
    let two = specs(&[("a", &[2]), ("b", &[2])]);
    let layout = Layout {
        kind: Kind::Model,
        config: &config,
        tensors: &two,
        dtype: Dtype::F32,
        shard_bytes: 8,
        copy: NONE,
    };
    let create = || FolderWriter::create(&path, &layout).expect("created");
    assert!(message(create().write("b", &[1.0])).contains("\"a\" has 2 elements and was given 0"));
    assert!(message(create().write("c", &[1.0])).contains("\"c\" was not announced"));
    assert!(message(create().write("a", &[1.0; 3])).contains("has 2 elements and was given 3"));
    let mut writer = create();
    writer.write("a", &[1.0, 2.0]).expect("written");
    writer.write("b", &[1.0]).expect("written");
    assert!(message(writer.finish()).contains("\"b\" has 2 elements and was given 1"));
    let twice = specs(&[("a", &[2]), ("a", &[2])]);
    let layout = Layout { tensors: &twice, shard_bytes: 100, ..layout };
    let mut writer = FolderWriter::create(&path, &layout).expect("created");
    assert!(message(writer.write("a", &[1.0])).contains("two tensors are named"));
    drop(writer);
    let copies = [root.path().join("x/config.json")];
    let layout = Layout { tensors: &two, copy: &copies, ..layout };
    assert!(message(FolderWriter::create(&path, &layout).map(drop)).contains("has a file of that name"));
    assert_eq!(fs::read_dir(root.path()).expect("listed").count(), 0);
    fs::create_dir(&path).expect("created");
    assert!(message(write(&path, &two, Dtype::F32, 8)).contains("exists already"));
}

#[test]
fn a_folder_is_copied_to_another_type_with_its_tokenizer() {
    let root = folder();
    let (from, to) = (root.path().join("from"), root.path().join("to"));
    write(&from, &specs(SPECS), Dtype::F32, 40).expect("written");
    fs::write(from.join("tokenizer.json"), "T").expect("written");
    fs::write(from.join("notes.md"), "N").expect("written");
    let folder = ModelFolder::open(&from).expect("opened");
    let tensors: Vec<_> =
        folder.tensors().iter().map(|info| (info.name.clone(), info.shape.clone())).collect();
    let copy = folder.companions();
    let layout = Layout {
        kind: Kind::Model,
        config: folder.config(),
        tensors: &tensors,
        dtype: Dtype::BF16,
        shard_bytes: u64::MAX,
        copy: &copy,
    };
    let mut writer = FolderWriter::create(&to, &layout).expect("created");
    for (name, _) in &tensors {
        writer.write(name, &folder.tensors().read_all(name).expect("read")).expect("written");
    }
    writer.finish().expect("finished");
    let mut names: Vec<String> = fs::read_dir(&to)
        .expect("listed")
        .map(|entry| entry.expect("listed").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let copy = ModelFolder::open(&to).expect("opened");
    assert_eq!(copy.tensors().read_all("a").expect("read"), values("a", 15));
}

#[test]
fn headers_and_configurations_of_a_size_that_nobody_writes_are_refused_before_they_take_memory() {
    let place = folder();
    let path = place.path().join("model.safetensors");
    let long = (33u64 << 20).to_le_bytes();
    fs::write(&path, long).expect("written");
    // Holes.
    fs::File::options().write(true).open(&path).and_then(|file| file.set_len(34 << 20)).expect("longer");
    assert!(message(Tensors::open(&path)).contains("its header has more than"));
    let path = place.path().join("config.json");
    fs::File::create(&path).and_then(|file| file.set_len(17 << 20)).expect("written");
    assert!(message(ModelFolder::open(place.path())).contains("has more than"));
    let long = "#".repeat(3 << 20);
    assert!(message(polystage::plan::Machine::parse(&long, "m.toml")).contains("m.toml: has more than"));
    let config = polystage::train::config::Config::parse(&long, &[], "c.toml");
    assert!(message(config).contains("c.toml: has more than"));
}

#[test]
fn headers_that_do_not_describe_their_file_exactly_are_refused() {
    let open = |header: &str, data: &[u8]| {
        let folder = model(&[("model.safetensors", &safetensors(header, data))]);
        ModelFolder::open(folder.path())
    };
    for (what, header, data) in [
        (
            "a gap",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#,
            12,
        ),
        (
            "an overlap",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            12,
        ),
        (
            "the same bytes twice",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        ("data past the end", r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
        ("bytes left over", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 8),
        (
            "a name twice",
            r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        ("space before the brace", r#" {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4),
        ("an overflow", r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        ("negative offsets", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}"#, 0),
    ] {
        let refused = message(open(header, &vec![0; data]));
        assert!(refused.contains("model.safetensors: invalid safetensors"), "{what}: {refused}");
    }
    let foreign = message(open(r#"{"q":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#, &[0; 4]));
    assert!(foreign.contains("tensor \"q\" is I8; convert it to F32, F16 or BF16"), "{foreign}");
}

#[test]
fn masks_and_frequencies_that_tools_store_are_not_parameters_whatever_their_type() {
    let header = r#"{"h.0.attn.bias":{"dtype":"BOOL","shape":[1,1,2,2],"data_offsets":[0,4]},"model.layers.0.self_attn.rotary_emb.inv_freq":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"h.0.attn.c_attn.bias":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;
    let folder = model(&[("model.safetensors", &safetensors(header, &[0; 12]))]);
    let folder = ModelFolder::open(folder.path()).expect("opened");
    let names: Vec<&str> = folder.tensors().iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["h.0.attn.c_attn.bias"]);
}

#[test]
fn a_check_lists_every_tensor_that_does_not_fit_at_once() {
    let root = folder();
    let path = root.path().join("model");
    write(&path, &specs(SPECS), Dtype::F32, u64::MAX).expect("written");
    let folder = ModelFolder::open(&path).expect("opened");
    let tensors = folder.tensors();
    assert!(tensors.check(&specs(SPECS), &[]).is_ok());
    let tied: Vec<_> = [specs(SPECS), specs(&[("head", &[9])])].concat();
    assert!(tensors.check(&tied, &["head".into()]).is_ok());
    let wanted = specs(&[
        ("a", &[5, 3]),
        ("bb", &[7]),
        ("empty", &[0, 4]),
        ("head", &[9]),
        ("x", &[1]),
        ("y", &[2, 2]),
    ]);
    let refused = message(tensors.check(&wanted, &["head".into()]));
    assert!(refused.contains("2 tensors missing: x [1], y [2, 2]"), "{refused}");
    assert!(refused.contains("1 tensor of another shape: a is [3, 5], the model needs [5, 3]"), "{refused}");
    assert!(refused.contains("2 tensors left over: c [], dddd [2, 2, 2]"), "{refused}");
}

#[test]
fn names_may_be_given_a_prefix_and_reading_refuses_what_is_not_there() {
    let files = model(&[("model.safetensors", &one("wte", 5.0))]);
    let mut folder = ModelFolder::open(files.path()).expect("opened");
    folder.tensors_mut().rename(|name| format!("transformer.{name}")).expect("renamed");
    let tensors = folder.tensors();
    assert_eq!(tensors.read_all("transformer.wte").expect("read"), [5.0]);
    assert_eq!(tensors.get("transformer.wte").map(|info| info.name.as_str()), Some("transformer.wte"));
    assert!(message(tensors.read_all("wte")).contains("tensor \"wte\" is missing"));
    for (range, len) in [(0..2, 2), (0..1, 2), (2..2, 0)] {
        assert!(message(tensors.read("transformer.wte", range, &mut vec![0.0; len])).contains("do not fill"));
    }
    let two = safetensors(
        r#"{"a.x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b.x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        &[0; 8],
    );
    let files = model(&[("model.safetensors", &two)]);
    let mut folder = ModelFolder::open(files.path()).expect("opened");
    assert!(
        message(folder.tensors_mut().rename(|_| "x".into())).contains("two tensors are both meant by \"x\"")
    );
}

#[test]
fn an_index_may_not_lead_out_of_the_folder_nor_disagree_with_its_files() {
    let index = |map: Value| {
        let index = json!({"metadata": {"total_size": 8}, "weight_map": map}).to_string();
        let folder = model(&[
            ("s1.safetensors", &one("a", 1.0)),
            ("s2.safetensors", &one("b", 2.0)),
            ("s3.safetensors", &one("a", 3.0)),
            ("model.safetensors.index.json", index.as_bytes()),
        ]);
        fs::create_dir(folder.path().join("sub")).expect("created");
        fs::write(folder.path().join("sub/s4.safetensors"), one("d", 4.0)).expect("written");
        ModelFolder::open(folder.path()).and_then(|folder| {
            folder
                .tensors()
                .iter()
                .map(|info| folder.tensors().read_all(&info.name))
                .collect::<polystage::Result<Vec<_>>>()
        })
    };
    let good = index(json!({"a": "s1.safetensors", "b": "s2.safetensors", "d": "sub/s4.safetensors"}));
    assert_eq!(good.expect("read"), [[1.0], [2.0], [4.0]]);
    for path in
        ["../s1.safetensors", "/etc/passwd", "sub/../s1.safetensors", "..\\s1.safetensors", "C:s1", "", "."]
    {
        let refused = message(index(json!({ "a": path })));
        assert!(
            refused.contains(&format!("names {path:?}")) && refused.contains("not a path below"),
            "{refused}"
        );
    }
    assert!(
        message(index(json!({"a": "gone.safetensors"}))).contains("\"gone.safetensors\", which is missing")
    );
    let lacks = message(index(json!({"a": "s1.safetensors", "x": "s1.safetensors", "y": "s1.safetensors"})));
    assert!(lacks.contains("s1.safetensors: lacks tensors that the index places in it: x, y"), "{lacks}");
    let twice = message(index(json!({"a": "s1.safetensors", "a2": "s3.safetensors"})));
    assert!(twice.contains("holds tensor \"a\", which") && twice.contains("holds too"), "{twice}");
    assert!(message(index(json!({}))).contains("names no tensor"));
    assert!(message(index(json!({"a": 5}))).contains("invalid JSON"));
    assert!(message(index(json!("a"))).contains("invalid JSON"));
}

#[cfg(unix)]
#[test]
fn links_may_lead_to_the_hubs_cache_and_nowhere_else_outside() {
    use std::os::unix::fs::symlink;
    let root = folder();
    let hub = root.path().join("models--x");
    for name in ["blobs", "snapshots/1", "elsewhere"] {
        fs::create_dir_all(hub.join(name)).expect("created");
    }
    let snapshot = hub.join("snapshots/1");
    fs::write(snapshot.join("config.json"), "{}").expect("written");
    fs::write(hub.join("blobs/abc"), one("a", 1.0)).expect("written");
    fs::write(hub.join("elsewhere/abc"), one("a", 1.0)).expect("written");
    let weights = snapshot.join("model.safetensors");
    symlink("../../blobs/abc", &weights).expect("linked");
    assert!(ModelFolder::open(&snapshot).is_ok());
    fs::remove_file(&weights).expect("removed");
    symlink("../../elsewhere/abc", &weights).expect("linked");
    assert!(message(ModelFolder::open(&snapshot)).contains("is a link that leaves the folder"));
    fs::remove_file(&weights).expect("removed");
    symlink("nowhere", &weights).expect("linked");
    assert!(message(ModelFolder::open(&snapshot)).contains("is missing"));
    fs::remove_file(&weights).expect("removed");
    // A link to a whole folder is the folder.
    fs::write(&weights, one("a", 1.0)).expect("written");
    symlink(&snapshot, root.path().join("link")).expect("linked");
    assert!(ModelFolder::open(&root.path().join("link")).is_ok());
}

#[test]
fn a_single_file_comes_before_an_index_and_neither_is_an_error() {
    let folder = model(&[("model.safetensors.index.json", b"{"), ("model.safetensors", &one("a", 1.0))]);
    assert!(ModelFolder::open(folder.path()).is_ok());
    let none = model(&[]);
    assert!(message(ModelFolder::open(none.path())).contains("model.safetensors: is missing"));
    fs::write(none.path().join("config.json"), "[]").expect("written");
    assert!(message(ModelFolder::open(none.path())).contains("config.json: is not a JSON object"));
    assert!(message(ModelFolder::open(&none.path().join("gone"))).contains("config.json: is missing"));
}

// --- damage -----------------------------------------------------------------------------------------------------------

/// What can be read of a folder, or its error.
fn read_everything(path: &Path) -> polystage::Result<Vec<(String, Vec<f32>)>> {
    let folder = ModelFolder::open(path)?;
    let tensors: &Tensors = folder.tensors();
    tensors.iter().map(|info| Ok((info.name.clone(), tensors.read_all(&info.name)?))).collect()
}

proptest! {
    #[test]
    fn a_damaged_model_folder_is_an_error_or_has_its_shapes_and_never_a_panic(
        file in 0usize..4, at in 0.0..1.0f64, flip in 1u8.., cut in any::<bool>(), sharded in any::<bool>(),
    ) {
        let root = folder();
        let path = root.path().join("model");
        write(&path, &specs(SPECS), Dtype::F16, if sharded { 40 } else { u64::MAX }).expect("written");
        let mut names: Vec<PathBuf> =
            fs::read_dir(&path).expect("listed").map(|entry| entry.expect("listed").path()).collect();
        names.sort();
        let victim = &names[file % names.len()];
        let mut bytes = fs::read(victim).expect("read");
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        fs::write(victim, bytes).expect("written");
        match read_everything(&path) {
            // Only a flip can go unnoticed, since safetensors has no checksum, and the loss of a line feed after JSON.
            Ok(tensors) => {
                prop_assert!(!cut || victim.extension().is_some_and(|e| e == "json") && at > 0);
                let lens: usize = tensors.iter().map(|(_, values)| values.len()).sum();
                prop_assert_eq!(lens, 15 + 7 + 1 + 8);
            }
            Err(error) => {
                prop_assert!(matches!(error, Error::Checkpoint { .. }), "{:?}", error);
                prop_assert_eq!(error.to_string().lines().count(), 1);
            }
        }
    }

    #[test]
    fn whatever_is_accepted_the_reference_implementation_reads_the_same(
        header in "\\{(\"[ab]\":\\{\"dtype\":\"(F32|F16|BF16)\",\"shape\":\\[[0-2](,[0-2])?\\],\"data_offsets\":\\[[0-8],[0-8]\\]\\},?){0,3}\\}",
        data in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let bytes = safetensors(&header, &data);
        let folder = model(&[("model.safetensors", &bytes)]);
        if let Ok(tensors) = read_everything(folder.path()) {
            let reference = SafeTensors::deserialize(&bytes).expect("valid");
            prop_assert_eq!(reference.len(), tensors.len());
            for (name, values) in tensors {
                let view = reference.tensor(&name).expect("there");
                prop_assert_eq!(view.shape().iter().product::<usize>(), values.len());
                if view.dtype() == safetensors::Dtype::F32 {
                    let bits: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                    prop_assert_eq!(view.data(), &bits[..]);
                }
            }
        }
    }
}
