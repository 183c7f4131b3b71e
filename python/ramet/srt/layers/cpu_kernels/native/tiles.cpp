// Owns the compiled blocks of tiles.h.
#include "tiles.h"

RAMET_TILES(, float)
RAMET_TILES(, Bf16)
RAMET_TILES(, F16)
RAMET_TILES(, F8)
