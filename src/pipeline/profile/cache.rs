//! Measurements on disk: a machine file for each adapter and each pair.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::Profiler;
use crate::folder::{hex, write_atomic};
use crate::gpu::{Device, KERNELS};
use crate::plan::Machine;

/// Counts the ways in which times have been measured: those of another way are measured again.
const WAY: u32 = 2;

impl Profiler<'_> {
    /// Everything that measured times depend on.
    pub(super) fn key(&self, devices: &[&Device]) -> String {
        let mut shaders = Sha256::new();
        for (name, text) in KERNELS {
            shaders.update(name);
            shaders.update(text);
        }
        let adapters: Vec<String> = devices
            .iter()
            .map(|d| format!("{} / {} / {}", d.info().name, d.info().backend, d.info().driver))
            .collect();
        let shaders = hex(&shaders.finalize()[..6]);
        format!("{} / shaders {shaders} / way {WAY} / {}", adapters.join(" + "), self.environment)
    }

    fn file(&self, key: &str) -> Option<PathBuf> {
        let name = hex(&Sha256::digest(key)[..12]);
        self.cache.as_ref().map(|folder| folder.join(format!("{name}.toml")))
    }

    /// What the cache has under this key; a damaged file counts as none.
    pub(super) fn read(&self, key: &str) -> Option<Machine> {
        let path = self.file(key).filter(|_| !self.fresh)?;
        let text = std::fs::read_to_string(&path).ok()?;
        Machine::parse(&text, &path.to_string_lossy()).ok().filter(|machine| machine.name == key)
    }

    /// Keeps a measurement. A cache that cannot be written costs seconds next time, nothing else.
    pub(super) fn write(&self, key: &str, machine: &Machine) {
        let (Some(folder), Some(path)) = (&self.cache, self.file(key)) else { return };
        if std::fs::create_dir_all(folder).is_ok() {
            let _ = write_atomic(&path, machine.to_toml().as_bytes());
        }
    }
}
