"""Examples at the end of each command's help."""

PROGRAM = """\
examples:
  storyadapter-trt doctor                                   which backends can serve here
  storyadapter-trt build --backend onnxruntime              prepare the demo model, once
  storyadapter-trt run --backend eager                      draw the demo story with plain PyTorch, no build needed
  storyadapter-trt run --help                               all that a story can be given
"""

BUILD = """\
examples:
  storyadapter-trt build                                    the demo model, for the default backend
  storyadapter-trt build --base-model SDXL --image-encoder CLIP --ip-adapter ip-adapter_sdxl.safetensors
  storyadapter-trt build … --height 768:1024 --width 768:1024 --max-frames 4      one engine for many sizes

When run finds no engine that fits, it prints the build command that makes one.
"""

PRUNE = """\
examples:
  storyadapter-trt engines prune --outdated                    what another version of the program built
  storyadapter-trt engines prune --older-than 30 --dry-run     what was not used for 30 days: only say so
  storyadapter-trt engines prune --keep-under 20               the least recently used, until less than 20 GiB are left
"""

CHECK = """\
examples:
  storyadapter-trt story check tale.yaml
  storyadapter-trt story check tale.csv --base-model SDXL --image-encoder CLIP --ip-adapter adapter.safetensors
"""

SCHEMA = """\
examples:
  storyadapter-trt story schema > story.schema.json
In VS Code and others, this as the first line of tale.yaml completes keys and marks mistakes:
  # yaml-language-server: $schema=story.schema.json
"""

RUN = """\
examples:
  storyadapter-trt run                                      the demo story with the demo model
  storyadapter-trt run --story tale.yaml --out tale         a story file
  storyadapter-trt run --prompt "a fox reads" "a fox sleeps in a forest" --seed 7
  storyadapter-trt run --base-model SDXL --image-encoder CLIP --ip-adapter ip-adapter_sdxl.safetensors --story tale.yaml
  storyadapter-trt run --story tale.yaml --out tale --resume    go on after Ctrl-C
  storyadapter-trt run … --controlnet openpose-sdxl:0.8 --control-images poses/    a pose per frame

A story file, tale.yaml (or the same as .json):
  title: Reynard's day
  style: comic
  characters:
    Reynard: a small red fox with a green scarf
    Ada: {definition: a girl in a blue coat, references: [ada-1.png, ada-2.png]}      pictures of her
  prompts:
    - Reynard wakes up in his burrow
    - prompt: Reynard meets an owl in the forest      a frame may have its own seed and negative prompt,
      negative: snow
      seed: 7
      control: poses/002.png                          and a picture for --controlnet, here beside the story file
The name of a character is replaced by its definition where it stands as a whole word, in the same case as typed.
A .csv or .tsv has a frame per row under a header: prompt (or character, interaction, scene), negative, seed, control.
A .txt or .md has a prompt per line, or is a numbered or bulleted list. --story - reads standard input.

DIR/ then holds iteration-00/frame-000.png …, frames/000.png … (the last iteration), contact-sheet.png (a row per
iteration), story.gif and story.json (every setting, the seed, versions, seconds per stage and before the first step).
"""

EDIT = """\
examples:
  storyadapter-trt edit tale --frame 7 --prompt "Ada sleeps under a tree"      into tale-edited; tale stays
  storyadapter-trt edit tale --frame 7 --seed 3 --frame 9 --negative snow --in-place
  storyadapter-trt edit tale --frame 7 --prompt "an owl" --all-iterations     the others see the new frame
  storyadapter-trt edit tale-edited --resume                                  go on after Ctrl-C

Frames are counted from 0, as in their files' names. story.json says which frames are older than the edit.
"""

SERVE = """\
examples:
  storyadapter-trt serve                                     the demo model, at http://127.0.0.1:8000
  storyadapter-trt serve --workers 2 --data /srv/stories     two GPUs
  storyadapter-trt serve --host 0.0.0.0 --keys keys.txt --allow-host stories.example.org

  echo "alice:$(printf %s "$KEY" | sha256sum | cut -d' ' -f1)" >> keys.txt      a key, which sees its own stories alone
  curl http://127.0.0.1:8000/v1/stories -H 'Content-Type: application/json' -d '{"prompts": ["a fox", "an owl"]}'
"""
