"""Named runs: values that the command line's flags override, and the result to expect."""

from train.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig

PRESETS: dict[str, Config] = {
    # cosine recall@1 on unseen characters 0.62 to 0.65 (raw pixels 0.28), in 60 CPU seconds
    "glyphs": Config(
        preset="glyphs",
        epochs=8,
        data=DataConfig(glyph_characters=200, glyph_images=40, batch_size=100, samples_per_class=2),
        model=ModelConfig(embed_dim=64, init_norm=10.0),
        loss=LossConfig(name="el-nivmf", n_samples=5, temperature=1.0, concentration=16.0),
        optim=OptimConfig(lr=3e-3, proxy_lr_mult=5.0, conc_lr_mult=5.0, temp_lr_mult=1.0),
    ),
    # for tests: whether everything runs, not whether it retrieves well
    "glyphs-tiny": Config(
        preset="glyphs-tiny",
        epochs=5,
        data=DataConfig(glyph_characters=40, glyph_images=20, batch_size=40, samples_per_class=2),
        model=ModelConfig(width=8, embed_dim=16, init_norm=10.0),
        loss=LossConfig(name="el-nivmf", n_samples=5, temperature=1.0, concentration=16.0),
        optim=OptimConfig(lr=3e-3, proxy_lr_mult=5.0, conc_lr_mult=5.0, temp_lr_mult=1.0),
    ),
}
