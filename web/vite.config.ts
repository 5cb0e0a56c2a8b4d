import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));

export default defineConfig({
  root: here("."),
  // Addresses relative to the page: the folder works wherever it is put.
  base: "./",
  resolve: { alias: { engine: here("pkg/polystage.js") } },
  worker: { format: "es" },
  build: {
    outDir: here("dist"),
    emptyOutDir: true,
    target: "es2022",
    // WebAssembly inside JavaScript would be a third larger and could not be compiled while it arrives.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
});
