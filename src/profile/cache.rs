//! Measurements on disk: a machine file for each adapter and each pair.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::folder::files::{read_bytes, read_text};
use crate::folder::{hex, write_atomic};
use crate::gpu::{Device, KERNELS, Tiles};
use crate::plan::{DeviceProfile, Link, Machine};

/// Counts the ways in which times have been measured: those of another way are measured again.
const WAY: u32 = 6;

/// No driver's kernels of one program are more.
const KERNEL_BYTES: u64 = 1 << 30;

/// Fewer bytes are headers alone, of drivers that put no kernel there: those on a CPU.
const KERNEL_HEADERS: usize = 1 << 10;

/// The fastest tiles of an adapter, as a file.
#[derive(Serialize, Deserialize)]
struct Tuned {
    name: String,
    tiles: Tiles,
}

/// A folder of measurements.
#[derive(Clone, Debug)]
pub struct Cache {
    /// The folder; it need not exist.
    pub folder: PathBuf,
    /// Whatever else the times depend on, such as the settings of a driver.
    pub environment: String,
}

impl Cache {
    /// Everything that measured times depend on.
    pub(super) fn key(&self, devices: &[&Device]) -> String {
        let mut shaders = Sha256::new();
        for (name, text) in KERNELS {
            shaders.update(name);
            shaders.update(text);
        }
        let adapters: Vec<String> = devices
            .iter()
            .map(|d| {
                let (info, capabilities) = (d.info(), d.capabilities());
                let subgroups = if info.subgroups { "" } else { " / no subgroups" };
                let f16 = match (capabilities.f16, capabilities.cooperative) {
                    (false, _) => String::new(),
                    (true, 0) => " / f16".into(),
                    (true, side) => format!(" / f16 by {side}"),
                };
                format!("{} / {} / {}{subgroups}{f16}", info.name, info.backend, info.driver)
            })
            .collect();
        let shaders = hex(&shaders.finalize()[..6]);
        format!("{} / shaders {shaders} / way {WAY} / {}", adapters.join(" + "), self.environment)
    }

    /// The adapter's profile; a damaged file counts as none.
    pub(super) fn read_device(&self, device: &Device) -> Option<DeviceProfile> {
        self.read(&self.key(&[device]))?.devices.into_iter().next()
    }

    /// Keeps the adapter's profile; whether that worked.
    pub(super) fn write_device(&self, device: &Device, profile: DeviceProfile) -> bool {
        self.write_profile(&self.key(&[device]), profile)
    }

    /// Keeps a profile under this key; whether that worked.
    pub(super) fn write_profile(&self, key: &str, profile: DeviceProfile) -> bool {
        let link = Link { gb_s: 1.0, ..Link::default() };
        self.write(key, Machine { link, devices: vec![profile], ..Machine::default() })
    }

    /// The adapter's fastest tiles; a damaged file counts as none.
    pub fn read_tiles(&self, device: &Device) -> Option<Tiles> {
        let key = self.key(&[device]);
        let text = read_text(&self.tiles(&key)).ok()?;
        toml::from_str::<Tuned>(&text).ok().filter(|tuned| tuned.name == key).map(|tuned| tuned.tiles)
    }

    /// Keeps them; whether that worked.
    pub fn write_tiles(&self, device: &Device, tiles: Tiles) -> bool {
        let tuned = Tuned { name: self.key(&[device]), tiles };
        let Ok(text) = toml::to_string(&tuned) else { return false };
        std::fs::create_dir_all(&self.folder).is_ok()
            && write_atomic(&self.tiles(&tuned.name), text.as_bytes()).is_ok()
    }

    /// From now on compiles no kernel again that is kept here, and keeps what else it compiles. One file an adapter, which a
    /// program with other shaders or another driver replaces; one that is damaged counts as none.
    pub fn keep_kernels(&self, device: &Device) {
        let info = device.info();
        // wgpu takes those of another card for a mistake of its caller, and two cards may have one name.
        let card = format!("{} {} {} {}", info.index, info.backend, info.vendor_id, info.device_id);
        let path = self.folder.join(hex(&Sha256::digest(&card)[..12])).with_extension("kernels");
        let key = format!("{card} / {}", self.key(&[device]));
        let sum = move |data: &[u8]| Sha256::new().chain_update(&key).chain_update(data).finalize();
        let kept = read_bytes(&path, KERNEL_BYTES).ok();
        let kept = kept.as_ref().and_then(|bytes| bytes.split_first_chunk::<32>());
        let kept = kept.filter(|(said, data)| said[..] == sum(data)[..]).map(|(_, data)| data);
        let folder = self.folder.clone();
        // SAFETY: its sum says that it is what was written here.
        unsafe {
            device.keep_kernels(kept, move |data| {
                if data.len() < KERNEL_HEADERS {
                    return;
                }
                // A cache that cannot be written costs seconds next time, nothing else.
                if std::fs::create_dir_all(&folder).is_ok() {
                    let _ = write_atomic(&path, &[&sum(data)[..], data].concat());
                }
            });
        }
    }

    fn tiles(&self, key: &str) -> PathBuf {
        self.file(key).with_extension("tiles.toml")
    }

    fn file(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{}.toml", hex(&Sha256::digest(key)[..12])))
    }

    /// What there is under this key; a damaged file counts as none.
    pub(super) fn read(&self, key: &str) -> Option<Machine> {
        let path = self.file(key);
        let text = read_text(&path).ok()?;
        Machine::parse(&text, &path.to_string_lossy()).ok().filter(|machine| machine.name == key)
    }

    /// Keeps a measurement; whether that worked. A cache that cannot be written costs seconds next time, nothing else.
    /// Several programs may do so at once: a reader sees a whole file, and the last writer wins.
    pub(super) fn write(&self, key: &str, machine: Machine) -> bool {
        let machine = Machine { name: key.into(), ..machine };
        std::fs::create_dir_all(&self.folder).is_ok()
            && write_atomic(&self.file(key), machine.to_toml().as_bytes()).is_ok()
    }
}
