//! Compiles the C++ shim against the libtorch that torch-sys found.

use std::env;
use std::path::PathBuf;

fn main() -> Result<(), &'static str> {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        return Ok(());
    }
    let lib = env::var_os("DEP_TCH_LIBTORCH_LIB")
        .map(PathBuf::from)
        .ok_or("torch-sys did not say where libtorch is; use a version that Cargo.toml allows")?;
    let include = match env::var_os("LIBTORCH_INCLUDE") {
        Some(root) => PathBuf::from(root).join("include"),
        None => lib.join("..").join("include"),
    };
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_string());
    let mut build = cc::Build::new();
    // For scripts/asan: the shim is watched, and the tests are linked with the watcher.
    println!("cargo:rerun-if-env-changed=RLHF_SANITIZE");
    if env::var_os("RLHF_SANITIZE").is_some() {
        build.flag("-fsanitize=address");
        build.flag("-fno-omit-frame-pointer").flag("-g");
        // By name, since rustc links without the compiler's default libraries.
        println!("cargo:rustc-link-arg-tests=-lasan");
    }
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        // What is rounded once is written so; square roots of vectors set no errno.
        .flag_if_supported("-ffp-contract=off")
        .flag_if_supported("-fno-math-errno")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .files([
            "csrc/adamw.cpp",
            "csrc/allocator.cpp",
            "csrc/attention.cpp",
            "csrc/autograd.cpp",
            "csrc/causal.cpp",
            "csrc/gemm.cpp",
            "csrc/linear.cpp",
            "csrc/memory.cpp",
            "csrc/shim.cpp",
            "csrc/softmax.cpp",
            "csrc/stop_early.cpp",
            "csrc/training.cpp",
        ]);
    if env::var_os("CARGO_FEATURE_DISTRIBUTED").is_some() {
        build
            .define("USE_C10D_GLOO", None)
            .include("csrc/gloo_names")
            .files(["csrc/c10d.cpp", "csrc/reducer.cpp"]);
    }
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        // nccl.h and cuda_runtime.h, where the compiler does not find them by itself.
        println!("cargo:rerun-if-env-changed=RLHF_CUDA_INCLUDE");
        let folders = env::var_os("RLHF_CUDA_INCLUDE").unwrap_or_default();
        build.includes(env::split_paths(&folders));
        build.define("USE_C10D_NCCL", None);
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
    }
    build.compile("rlhf_scale_shim");
    // A static library must come before the ones whose symbols it uses, so torch-sys's own
    // mention of these two may be too early for it.
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    Ok(())
}
